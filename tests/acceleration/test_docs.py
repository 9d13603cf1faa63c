"""docs/accelerate_patterns.md has a line for each pattern that is tested."""

import re
from pathlib import Path

import patterns
import pypi_models
import pytest
import test_chains
import test_pairs

PAGE = (Path(__file__).parents[2] / "docs" / "accelerate_patterns.md").read_text()
TABLES = {
    "patterns": patterns.CASES,
    "mean": test_pairs.MEANS,
    "upsampling": test_pairs.UPSAMPLINGS,
    "activation": test_pairs.ACTIVATIONS,
    "dimension": test_pairs.DIMENSIONS,
    "deviation": test_chains.STDDEV,
    "chain": test_chains.BIAS_ACT,
    "pixel norm": test_chains.PIXEL_NORM,
}


@pytest.mark.parametrize("table", TABLES)
def test_each_pattern_has_its_line(table):
    """Under its name, or, where two tables have that, under the table's name and its own."""
    lines = re.findall(r"^\| (?:(\w[\w ]*): )?([^|]+?) \|", PAGE, re.MULTILINE)
    listed = {name for of, name in lines if of in ("", table)}
    assert set(TABLES[table]) - listed == set()


def test_each_package_has_its_line():
    for package, version in pypi_models.VERSIONS.items():
        assert f"| {package} {version} |" in PAGE
