"""Models from PyPI, and the ways in which GANs are commonly written: accelerated, they are what they were."""

import harness
import patterns
import pypi_models
import pytest
import torch

CASES = patterns.CASES | pypi_models.cases()


@pytest.fixture
def case(request):
    found = CASES[request.param]
    try:
        found.new()
    except pypi_models.NotAvailable as reason:
        pytest.skip(str(reason))
    return found


each_case = pytest.mark.parametrize("case", CASES, indirect=True)


@each_case
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers(case, dtype, channels_last):
    if dtype == torch.float64 and not case.doubles:
        pytest.skip("its own code does not run in double precision")
    harness.check_numbers(case, dtype, channels_last)


@each_case
def test_checkpoints(case):
    harness.check_checkpoints(case)


@each_case
def test_copies(case):
    harness.check_copies(case)


@each_case
@pytest.mark.parametrize(("hooks_first", "channels_last"), [(True, False), (False, True)])
def test_hooks(case, hooks_first, channels_last):
    harness.check_hooks(case, hooks_first, channels_last)


@each_case
def test_modes(case):
    harness.check_modes(case)


@each_case
def test_restore(case):
    harness.check_restore(case)
