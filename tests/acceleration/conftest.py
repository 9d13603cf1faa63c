"""harness, patterns and pypi_models can be imported by the tests of this folder."""

import math
import sys
from pathlib import Path

import pytest

from gankern.acceleration import _convolutions, _functions, _root, _spectral

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def small_models_count(request, monkeypatch):
    """What is for large tensors alone is done for the tests' small ones too, but for those marked ``as_it_is``."""
    if request.node.get_closest_marker("as_it_is") is None:
        monkeypatch.setattr(_functions, "FROM", {"cpu": 0, "cuda": 0})
        monkeypatch.setattr(_convolutions, "CALL", -math.inf)
        monkeypatch.setattr(_convolutions, "PAIR", 0.0)
        monkeypatch.setattr(_spectral, "FROM", 0)
        for cost in ("operation", "forward", "layer"):
            monkeypatch.setattr(_root.Gains, cost, 0.0)
