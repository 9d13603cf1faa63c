"""CONTRIBUTING.md is true: every file that its lists name exists, for every primitive, model and game."""

import re
from pathlib import Path

import pytest

import gankern.functional  # noqa: F401 (declares the primitives)
from gankern import games, models
from gankern.core.dispatch import Primitive

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
WITHOUT = {
    # What is no layer: see gankern.penalties and gankern.nn.utils.
    "gankern/nn/modules/gradient_penalty.py",
    "gankern/nn/modules/spectral_norm.py",
    "gankern/triton/convolution.py",  # torch's own convolutions run on a GPU
    # The kernels of batch norm are those of instance and group norm too, and tested as such.
    *(f"csrc/cpu/{of}_norm_act.{kind}" for of in ("instance", "group") for kind in ("h", "cpp")),
    *(f"csrc/cpu/testing/{of}_norm_act.cpp" for of in ("instance", "group")),
}


def listed(placeholder):
    """The paths in bold of the lists that have the placeholder."""
    paths = re.findall(rf"\*\*`([^`]*<{placeholder}>[^`]*)`\*\*", TEXT)
    assert paths
    return paths


def test_a_primitive_is_twelve_files():
    """And two lines in others; the thirteenth is for the cost of a call."""
    of_the_guide = TEXT.partition("## A new primitive")[2].partition("\n## ")[0]
    twelve, _, faster = of_the_guide.partition("\n### ")
    assert len(set(re.findall(r"\*\*`([^`]*<primitive>[^`]*)`\*\*", twelve))) == 12
    assert re.findall(r"\*\*`([^`]*<primitive>[^`]*)`\*\*", faster) == ["csrc/autograd/<primitive>.cpp"]
    assert listed("model") == ["gankern/models/<model>.py"]


@pytest.mark.parametrize("place", ["functional", "nn"])
def test_two_lines_make_a_primitive_public(place):
    """A file's names are listed there, and nowhere else: no other file of the package names a primitive's file."""
    package = ROOT / "gankern" / place
    text = (package / "__init__.py").read_text()
    files = package.glob("*.py") if place == "functional" else (package / "modules").glob("*.py")
    for file in (f for f in files if not f.stem.startswith("_") and f.stem in Primitive.registry):
        assert f".{file.stem} import " in text, file


@pytest.mark.parametrize("name", sorted(Primitive.registry))
def test_every_step_of_every_primitive(name):
    faster = "csrc/autograd/<primitive>.cpp"  # where what a call costs the host matters
    files = {path.replace("<primitive>", name) for path in listed("primitive") if path != faster} - WITHOUT
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []


def test_every_step_of_every_kernel_in_cuda():
    having = [n for n, p in Primitive.registry.items() if any(tier.name == "cuda" for tier in p.implementations)]
    assert having
    for name in having:
        assert all((ROOT / path.replace("<kernel>", name)).is_file() for path in listed("kernel")), name
        for path in ("csrc/cuda/testing/main.cpp", "tests/cuda/test_kernels.py"):
            assert f"**`{path}`**" in TEXT and name in (ROOT / path).read_text(), (path, name)


def test_every_model_and_game():
    for make in models.MODELS.values():
        name = make.__module__.rpartition(".")[2]
        assert all((ROOT / path.replace("<model>", name)).is_file() for path in listed("model"))
    for name in set(games.names()) - set(models.MODELS):
        missing = [path for path in listed("game") if not (ROOT / path.replace("<game>", name)).is_file()]
        assert missing == [], name
        assert f"gankern train {name}" in (ROOT / "docs" / "models" / f"{name}.md").read_text(), name
        assert f"\n| [`{name}`](models/{name}.md) |" in (ROOT / "docs" / "games.md").read_text(), name


def test_the_floors_are_those_that_are_enforced():
    named = re.findall(r"`(?:gankern/)?(\w+)/`", TEXT.partition("## The floors")[2].partition("\n## ")[0])
    there = {path.name for path in (ROOT / "gankern").iterdir() if (path / "__init__.py").is_file()}
    assert there | {"csrc", "tests", "benchmarks", "docs", "examples", "scripts"} <= set(named)
    places = {path.name for top in ("gankern", "csrc", "tests") for path in (ROOT / top).rglob("*") if path.is_dir()}
    assert [name for name in named if name not in places and not (ROOT / name).is_dir()] == []


def test_files_that_code_and_pages_name_are_there():
    """Comments and pages say where something stands: of what moved, they say so too."""
    naming = [*(ROOT / "gankern").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.py")]
    naming += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    named = re.compile(
        r"(?<![\w./-])(?:csrc|gankern|tests|benchmarks|docs|scripts|examples)/[a-z0-9_./-]+\.(?:py|cpp|h|cu|md)\b"
    )
    places = {name: path for path in naming for name in named.findall(path.read_text())}
    assert len(places) > 100
    assert {name: str(path) for name, path in places.items() if not (ROOT / name).is_file()} == {}


def test_few_things_lie_in_the_package():
    tracked = [p for p in (ROOT / "gankern").iterdir() if p.suffix != ".so" and p.name != "__pycache__"]
    assert len(tracked) <= 22, sorted(p.name for p in tracked)


def test_operators_take_from_torch_what_2_11_has():
    """Of torch's stable ABI, macros that later versions alone define: the oldest torch that is supported is on no machine
    that runs these tests, and its headers are what such sources do not compile with."""
    later = re.compile(r"\bSTABLE_TORCH_(?!LIBRARY)\w+")
    sources = [path for kind in ("h", "cpp") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    assert len(sources) > 50
    assert {(path.name, name) for path in sources for name in later.findall(path.read_text())} == set()
