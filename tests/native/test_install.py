"""What strangers install: the source archive is whole, builds a wheel without a compiler, and the wheel works alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = (".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "runs")


def run(*command, cwd, **environment):
    changed = {**os.environ, "GANKERN_BUILD_NATIVE": "0", **environment}
    changed.pop("PYTHONPATH", None)
    return subprocess.run(list(map(str, command)), cwd=cwd, env=changed, capture_output=True, text=True, timeout=300)


def hook(source, call, **environment):
    """What a hook of the project's build backend gives, called as pip calls it."""
    code = f"import sys; sys.path.insert(0, 'scripts'); import build_backend; print(build_backend.{call})"
    done = run(sys.executable, "-c", code, cwd=source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout") / "gankern"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    (folder / "gankern" / "stale.so").write_bytes(b"of an earlier build")
    return folder


@pytest.fixture(scope="module")
def archive(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    return folder / hook(checkout, f"build_sdist({str(folder)!r})")


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder)
    done = run(sys.executable, "-m", "pip", "wheel", *options, archive, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_archive_has_what_the_build_needs(archive):
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "gankern").rglob("*.py")}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "scripts/build_backend.py", "README.md", "LICENSE"}
    assert sources | own | needed | {"gankern/py.typed", "gankern/measure/report/page.html"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_without_native_code_is_for_every_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (metadata,) = (file.read(name).decode() for name in names if name.endswith("METADATA"))
    assert {"gankern/py.typed", "gankern/measure/report/page.html", "gankern/__main__.py"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"gankern"}
    assert not [name for name in names if name.endswith(".so")]
    for line in ("License-Expression: Apache-2.0", "Provides-Extra: train", "Requires-Dist: torch>=2.11"):
        assert line in metadata


def test_it_runs_in_an_environment_of_its_own(wheel, tmp_path):
    done = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bin = tmp_path / "venv" / "bin"
    site = Path(
        run(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    )
    options = ("--no-deps", "--no-index", "--quiet")
    done = run(sys.executable, "-m", "pip", "--python", bin / "python", "install", *options, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (site / "torch_from_outside.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch is large
    done = run(bin / "gankern", "--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("gankern 0."), done.stderr
    done = run(
        bin / "python", "-c", "import gankern.functional, os; print(os.path.dirname(gankern.__file__))", cwd=tmp_path
    )
    assert Path(done.stdout.strip()) == site / "gankern", done.stderr
    done = run(bin / "gankern", "info", cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0 and "the native library was not built" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("what", ["wheel", "editable"])
def test_torch_is_asked_for_only_where_there_is_something_to_build(checkout, what):
    assert hook(checkout, f"get_requires_for_build_{what}()", GANKERN_BUILD_NATIVE="0") == "[]"
    needed = hook(checkout, f"get_requires_for_build_{what}()", GANKERN_BUILD_NATIVE="1")
    assert all(word in needed for word in ("torch>=2.11", "cmake", "ninja", "pybind11"))


def test_a_wheel_with_native_code_is_for_every_python(checkout, tmp_path):
    """Nothing is built here: what it would be called is asked."""
    command = ["setup.py", "--quiet", "bdist_wheel", "--skip-build", "--dist-dir", tmp_path]
    done = run(sys.executable, *command, cwd=checkout, GANKERN_BUILD_NATIVE="1")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in path.name and not path.name.endswith("any.whl")


def test_old_setuptools_is_one_sentence(checkout):
    code = "import setuptools; setuptools.__version__ = '65.5.0'; exec(open('setup.py').read())"
    done = run(sys.executable, "-c", code, cwd=checkout)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "gankern: the build needs setuptools 77 or later, this is 65.5.0: pip install -U setuptools, "
        "or leave --no-build-isolation out."
    )
