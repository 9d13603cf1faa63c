"""The examples in docstrings give what they say, with the names of their module and what they import."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import gankern

MODULES = [
    module.name
    for module in pkgutil.walk_packages(gankern.__path__, "gankern.", onerror=lambda name: None)
    if module.name not in ("gankern._C", "gankern.libgankern_ops") and not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told = []
    for test in tests:
        torch.manual_seed(0)
        runner.run(test, out=told.append)
    assert runner.failures == 0, "".join(told)


def test_there_are_examples():
    assert len(MODULES) > 80
