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
    "gankern/triton/convolution.py",  # torch's own convolutions run on a GPU
    # The kernels of batch norm are those of instance norm too, and tested as such.
    "csrc/cpu/instance_norm_act.h",
    "csrc/cpu/instance_norm_act.cpp",
    "csrc/cpu/testing/instance_norm_act.cpp",
}


def listed(placeholder):
    """The paths in bold of the lists that have the placeholder."""
    paths = re.findall(rf"\*\*`([^`]*<{placeholder}>[^`]*)`\*\*", TEXT)
    assert paths
    return paths


@pytest.mark.parametrize("name", sorted(Primitive.registry))
def test_every_step_of_every_primitive(name):
    files = {path.replace("<primitive>", name) for path in listed("primitive")} - WITHOUT
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []


def test_every_model_and_game():
    for make in models.MODELS.values():
        name = make.__module__.rpartition(".")[2]
        assert all((ROOT / path.replace("<model>", name)).is_file() for path in listed("model"))
    for name in set(games.names()) - set(models.MODELS):
        missing = [path for path in listed("game") if not (ROOT / path.replace("<game>", name)).is_file()]
        assert missing == [], name


def test_the_floors_are_those_that_are_enforced():
    named = re.findall(r"`(?:gankern/)?(\w+)/`", TEXT.partition("## The floors")[2].partition("\n## ")[0])
    there = {path.name for path in (ROOT / "gankern").iterdir() if (path / "__init__.py").is_file()}
    assert there <= set(named)


def test_few_things_lie_in_the_package():
    tracked = [p for p in (ROOT / "gankern").iterdir() if p.suffix != ".so" and p.name != "__pycache__"]
    assert len(tracked) <= 22, sorted(p.name for p in tracked)
