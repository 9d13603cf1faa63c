"""Layers that filter, and filters by name."""

import sys

import numpy as np
import pytest
import scipy.signal
import torch

import gankern.functional as GF
import gankern.nn as gnn
from gankern import filters


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (gnn.Blur2d(), lambda x: GF.filter2d(x, filters.fir("121"))),
        (gnn.FIRUpsample2d(), lambda x: GF.upsample2d(x, filters.fir("1331"))),
        (gnn.FIRUpsample2d(3, "kaiser"), lambda x: GF.upsample2d(x, filters.fir("kaiser", factor=3), up=3)),
        (gnn.FIRDownsample2d(2, [1, 2, 1]), lambda x: GF.downsample2d(x, filters.fir("121"))),
    ],
)
def test_filter_layers(layer, function):
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(layer(x), function(x))
    assert not layer.state_dict() and not list(layer.parameters())
    assert layer.double().filter.dtype == torch.float64
    assert "filter=" in repr(layer)
    layer.float()


def test_filters_by_name():
    for name in filters.NAMES:
        f = filters.fir(name)
        torch.testing.assert_close(f.sum(), torch.tensor(1.0))
        assert torch.allclose(f, f.flip(0), atol=1e-7)
    assert torch.equal(filters.fir("1331"), torch.tensor([1.0, 3, 3, 1]) / 8)
    assert torch.equal(filters.fir("box", factor=4), torch.full((4,), 0.25))
    assert torch.equal(filters.fir([[1.0, 1.0]]), torch.tensor([[0.5, 0.5]]))
    # The closed form of Lanczos: sinc(t) sinc(t / 3), t in samples of the coarser grid.
    t = (np.arange(12) - 5.5) / 2
    lanczos = np.sinc(t) * np.sinc(t / 3)
    np.testing.assert_allclose(filters.fir("lanczos", dtype=torch.float64), lanczos / lanczos.sum(), atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_kaiser_filter_attenuates_what_would_alias(factor):
    f = filters.fir("kaiser", factor=factor, taps=24 * factor, dtype=torch.float64).numpy()
    frequency, response = scipy.signal.freqz(f, worN=2048, fs=2)
    assert 20 * np.log10(np.abs(response[frequency > 1.4 / factor]).max()) < -55
    assert abs(np.abs(response[frequency < 0.6 / factor]) - 1).max() < 0.01


def test_bad_filters(monkeypatch):
    with pytest.raises(ValueError, match="unknown filter 'lanzos'; did you mean lanczos"):
        filters.fir("lanzos")
    with pytest.raises(ValueError, match="'1331' has a fixed number of taps, and taps is 5"):
        filters.fir("1331", taps=5)
    with pytest.raises(ValueError, match="taps sum to 0"):
        filters.fir([1, -1])
    with pytest.raises(ValueError, match=r"taps have shape \(0,\)"):
        filters.fir([])
    with pytest.raises(ValueError, match="factor is 0"):
        gnn.FIRUpsample2d(0)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(
        ImportError, match=r"a 'lanczos' or 'kaiser' filter needs scipy: pip install 'gankern\[filters\]'"
    ):
        filters.fir("kaiser")
