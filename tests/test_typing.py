"""What a type checker, and a reader, sees of the public names."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

import gankern

ROOT = Path(gankern.__file__).parents[1]
PACKAGES = [
    "acceleration", "data", "diagnostics", "filters", "functional", "games", "losses", "metrics", "models", "nn",
    "penalties", "theory", "training",
]  # fmt: skip


def own(package):
    """(name, value) of the public classes and functions that a package has of its own, not of torch."""
    module = importlib.import_module(f"gankern.{package}")
    for name in getattr(module, "__all__", vars(module)):
        value, place = getattr(module, name), module.__name__ if not hasattr(module, "__all__") else "gankern."
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "").startswith(place):
            yield name, value


OWN = [pytest.param(value, id=f"{package}.{name}") for package in PACKAGES for name, value in own(package)]


SNIPPET = """\
import gankern
import gankern.functional as F
import gankern.nn as nn
reveal_type(gankern.accelerate)
reveal_type(F.relu)
reveal_type(F.conv2d)
reveal_type(F.softmax)
reveal_type(nn.Conv2d)
reveal_type(nn.Module)
reveal_type(gankern.penalties.gradient_penalty)
reveal_type(gankern.penalties.r1_penalty)
reveal_type(gankern.penalties.lipschitz)
gankern.penalties.r2_penalty(nn.ReLU(), [], half=True, target=0.0)
gankern.no_such_name
F.no_such_function
nn.NoSuchLayer
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment in which the package is installed: a copy of what a wheel has of it for a type
    checker, beside the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for file in Path(gankern.__file__).parent.rglob("*"):
        if file.suffix in (".py", ".typed"):
            copy = site / "gankern" / file.relative_to(Path(gankern.__file__).parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def checked(installed):
    """What mypy says of each line, from 1, to who has the package installed."""
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--python-executable", installed]
    command += ["--cache-dir", ROOT / ".mypy_cache", "-c", SNIPPET]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=installed.parent, capture_output=True, text=True, timeout=300, env=environment)
    assert not done.stderr, done.stderr
    said = {}
    for line in done.stdout.splitlines():
        where, number, rest = line.split(":", 2)
        assert where == "<string>", line  # else the package itself is wrong
        said.setdefault(int(number), rest.strip())
    return {line: said.get(number, "") for number, line in enumerate(SNIPPET.splitlines(), 1)}


def test_accelerate_is_the_function_of_that_name(checked):
    revealed = checked["reveal_type(gankern.accelerate)"]
    parameters = inspect.signature(gankern.accelerate).parameters
    assert revealed.startswith('note: Revealed type is "def (')
    assert [name for name in parameters if f"{name}: " not in revealed] == []
    assert "Report" in revealed.rpartition("->")[2]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("reveal_type(F.relu)", "implementation: "),  # gankern's, not torch's
        ("reveal_type(F.conv2d)", "weight_scale: "),
        ("reveal_type(F.softmax)", "dim: "),  # torch's, under gankern's name
        ("reveal_type(nn.Conv2d)", "-> gankern.nn.modules.convolution.Conv2d"),
        ("reveal_type(nn.Module)", "-> torch.nn.modules.module.Module"),
        ("reveal_type(gankern.penalties.gradient_penalty)", "critic_kwargs: "),
        ("reveal_type(gankern.penalties.r1_penalty)", "'critic_kwargs'?: "),
        ("reveal_type(gankern.penalties.lipschitz)", "'one_sided'?: "),
        (
            "gankern.penalties.r2_penalty(nn.ReLU(), [], half=True, target=0.0)",
            'error: Unexpected keyword argument "target"',
        ),
    ],
)
def test_revealed(checked, line, part):
    assert part in checked[line]


@pytest.mark.parametrize("line", ["gankern.no_such_name", "F.no_such_function", "nn.NoSuchLayer"])
def test_a_name_that_does_not_exist_is_an_error(checked, line):
    assert checked[line].startswith("error: Module has no attribute")


def test_no_part_of_the_package_may_leave_out_types():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["disallow_untyped_defs"] and settings["disallow_incomplete_defs"]
    weaker = {key for row in settings["overrides"] for key in row} - {"module", "ignore_missing_imports"}
    assert weaker == set()


def test_the_package_says_that_it_is_typed():
    assert (Path(gankern.__file__).parent / "py.typed").is_file()


def test_dir_has_the_names_that_are_imported_when_they_are_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", "import gankern; print(*dir(gankern))"], cwd=ROOT, capture_output=True, text=True
    )
    assert {*gankern._LAZY, *gankern._MODULES, *gankern.__all__} <= {*done.stdout.split()}


@pytest.mark.parametrize("value", OWN)
def test_docstring(value):
    assert value.__doc__ and value.__doc__.strip()
    if inspect.isclass(value):  # its own, where it is not the base's by intent
        assert "__doc__" in vars(value)


@pytest.mark.parametrize("value", OWN)
def test_arguments_have_names_and_types(value):
    function = value.__init__ if inspect.isclass(value) else value
    function = inspect.unwrap(function)
    if not getattr(function, "__module__", "").startswith("gankern."):  # torch's, or a dataclass's
        return
    parameters = list(inspect.signature(function).parameters.values())[inspect.isclass(value) :]
    kinds = {p.kind for p in parameters}
    assert not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
    assert [p.name for p in parameters if p.annotation is inspect.Parameter.empty] == []
