"""Layers that resample, the ICNR initialisation, and filters by name."""

import sys

import numpy as np
import pytest
import scipy.signal
import torch
from torch import nn
from torch.nn import functional as F

import gankern.functional as GF
import gankern.nn as gnn
from gankern import filters


@pytest.mark.parametrize("factor", [2, 3])
def test_icnr_makes_the_first_output_nearest_neighbour_upsampling(factor):
    layer = gnn.SubpixelConv2d(5, 4, 3, factor, padding=1)
    x = torch.randn(2, 5, 6, 7)
    low = F.conv2d(x, layer.weight[:: factor**2], layer.bias[:: factor**2], padding=1)
    torch.testing.assert_close(layer(x), F.interpolate(low, scale_factor=factor))
    plain = gnn.SubpixelConv2d(5, 4, 3, factor, padding=1, icnr=False)(x)
    assert not torch.allclose(plain[..., ::factor, ::factor], plain[..., 1::factor, ::factor])


def test_icnr_with_an_initialiser_of_ones_own():
    weight = torch.empty(8, 3, 3, 3)
    assert gnn.init.icnr_(weight, 2, lambda w: nn.init.normal_(w, 0, 5)) is weight
    assert torch.equal(weight[0], weight[3]) and not torch.equal(weight[0], weight[4])
    assert 3 < weight.std() < 7
    with pytest.raises(
        ValueError, match=r"icnr_: weight has shape \(6, 3\); its first dimension must be a multiple of 4"
    ):
        gnn.init.icnr_(torch.empty(6, 3))
    with pytest.raises(ValueError, match="icnr_: upscale_factor is 0"):
        gnn.init.icnr_(weight, 0)


def test_subpixel_convolutions_are_convolutions_with_a_pixel_shuffle():
    layer = gnn.SubpixelConv2d(5, 4, (3, 1), 2, padding=(1, 0), bias=False)
    conv = nn.Conv2d(5, 16, (3, 1), padding=(1, 0), bias=False)
    conv.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(layer(x), F.pixel_shuffle(conv(x), 2))
    assert "upscale_factor=2" in repr(layer)
    with pytest.raises(ValueError, match="SubpixelConv2d: upscale_factor is 1.5"):
        gnn.SubpixelConv2d(5, 4, 3, 1.5)


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (gnn.Blur2d(), lambda x: GF.filter2d(x, filters.fir("121"))),
        (gnn.FIRUpsample2d(), lambda x: GF.upsample2d(x, filters.fir("1331"))),
        (gnn.FIRUpsample2d(3, "kaiser"), lambda x: GF.upsample2d(x, filters.fir("kaiser", factor=3), 3)),
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


@pytest.mark.parametrize(("dimensions", "convolution"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_icnr_in_any_number_of_dimensions(dimensions, convolution, factor):
    """The phases of a channel are equal, the channels are not, and each is as the initialiser drew it."""
    phases, drawn = factor**dimensions, []

    def initializer(weight):
        drawn.append(nn.init.normal_(weight).clone())

    weight = convolution(4, 5 * phases, 3, bias=False).weight
    gnn.init.icnr_(weight, factor, initializer)
    assert torch.equal(weight.unflatten(0, (5, phases)), drawn[0][:, None].expand(-1, phases, *drawn[0].shape[1:]))


def test_icnr_refuses_what_no_pixel_shuffle_follows():
    with pytest.raises(ValueError, match=r"first dimension must be a multiple of 8, upscale_factor to the power of 3"):
        gnn.init.icnr_(torch.empty(12, 2, 3, 3, 3), 2)
    for shape in ((8,), (8, 2, 3, 3, 3, 3)):
        with pytest.raises(ValueError, match="convolution in 1, 2 or 3 dimensions"):
            gnn.init.icnr_(torch.empty(shape), 2)
    for wrong in (None, [1.0], torch.empty(4, 2, 3, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="icnr_: weight must"):
            gnn.init.icnr_(wrong, 2)
    with pytest.raises(ValueError, match="upscale_factor is True"):
        gnn.init.icnr_(torch.empty(4, 2, 3, 3), True)
    with pytest.raises(TypeError, match="initializer must be a function"):
        gnn.init.icnr_(torch.empty(4, 2, 3, 3), 2, None)
