"""Readers of these tests are trained no longer than they have to be: what they read is held against nothing."""

from functools import cache

import pytest

from gankern import metrics
from gankern.games import _measures
from gankern.metrics import extractors

# Apart from those that other tests of the process keep.
_trained, _reader = (cache(function.__wrapped__) for function in (extractors._kept, _measures.reader))


@pytest.fixture(autouse=True)
def short_readers(monkeypatch):
    monkeypatch.setattr(metrics.train_classifier, "__defaults__", (None, 2, 0))
    monkeypatch.setattr(_measures, "LONG", 2)
    monkeypatch.setattr(extractors, "_kept", _trained)
    monkeypatch.setattr(_measures, "reader", _reader)
