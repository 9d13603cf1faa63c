"""Readers of these tests are trained no longer than they have to be: what they read is held against nothing."""

import pytest

from gankern.games import _measures


@pytest.fixture(autouse=True)
def short_readers(monkeypatch):
    monkeypatch.setattr(_measures, "LONG", 2)
