"""Models from PyPI, and the ways in which GANs are commonly written: accelerated, they are what they were."""

import harness
import patterns
import pypi_models
import pytest
import torch

import gankern

CASES = patterns.CASES | pypi_models.cases(progan_depth=3, progan_width=64)


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
@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float32, False), (torch.float64, False), (torch.float64, True)]
)
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


COMPILED = [
    "handwritten gradient penalty",
    "functional upsampling",
    "discriminator that returns a dict",
    "spectrally normalised layer used twice, hook",
    "mimicry sngan_32 discriminator",
    "mimicry wgan_gp_32 generator",
]


@pytest.mark.parametrize("case", COMPILED, indirect=True)
def test_compile_afterwards(case):
    harness.check_compile(case)


@pytest.mark.parametrize("case", ["mimicry sngan_32 discriminator", "copied SpectralNorm wrapper"], indirect=True)
def test_distributed_before_and_after(case, tmp_path):
    harness.check_distributed(case, tmp_path)


@pytest.mark.parametrize("case", ["mimicry wgan_gp_32 discriminator", "torchgan spectral norm"], indirect=True)
def test_what_is_replaced(case):
    """Convolutions with the mean behind them, and each layer's spectral norm."""
    rows = gankern.accelerate(case.new()).replaced
    what = "mean" if "wgan" in case.name else "spectral norm"
    assert sum(what in row.after for row in rows) >= 2


def test_a_package_that_cannot_be_had(monkeypatch):
    monkeypatch.setitem(pypi_models.VERSIONS, "torch-mimicry", "0.0.0.never")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    pypi_models._installed.cache_clear()
    reason = pypi_models._installed("torch-mimicry")
    pypi_models._installed.cache_clear()
    assert isinstance(reason, pypi_models.NotAvailable) and "cannot be installed from PyPI" in str(reason)
