"""The convolution layers: torch's names, initialisation and state_dict keys, and the same numbers."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern.nn as gnn
from gankern.nn.modules import convolution


def pair(ours, theirs, *args, **kwargs):
    torch.manual_seed(0)
    a = ours(*args, **kwargs)
    torch.manual_seed(0)
    b = theirs(*args, **kwargs)
    for (key, p), (other, q) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert key == other and torch.equal(p, q)
    return a, b


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((4, 6, 3), {"padding": 1}),
        ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}),
        ((4, 6, 3), {"padding": "same", "bias": False}),
        ((4, 6, 4, 2, 1), {}),
        ((4, 6, 5), {"stride": 2, "padding": 2, "groups": 2}),
        ((4, 6, (3, 1)), {"dilation": 2}),
    ],
)
def test_conv2d(args, options):
    ours, theirs = pair(gnn.Conv2d, nn.Conv2d, *args, **options)
    x = torch.randn(2, 4, 10, 10)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x[0]), theirs(x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "options"), [((4, 6, 4, 2, 1), {}), ((4, 6, 4, 2, 1), {"bias": False}), ((4, 6, 4, 2), {"groups": 2})]
)
def test_conv_transpose2d(args, options):
    ours, theirs = pair(gnn.ConvTranspose2d, nn.ConvTranspose2d, *args, **options)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    size = [s + 1 for s in theirs(x).shape[2:]]
    torch.testing.assert_close(ours(x, size), theirs(x, size), rtol=1e-4, atol=1e-5)


def test_uneven_overlap_warns_once(monkeypatch):
    monkeypatch.setattr(convolution, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gnn.ConvTranspose2d(4, 4, 4, 2, 1)
        gnn.ConvTranspose2d(4, 4, 3, 1)
    with pytest.warns(UserWarning, match="overlap unevenly.*UpsampleConv2d"):
        gnn.ConvTranspose2d(4, 4, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gnn.ConvTranspose2d(4, 4, 5, 2)


def test_resampling():
    x = torch.randn(2, 4, 6, 8)
    up = gnn.UpsampleConv2d(4, 6)
    assert set(up.state_dict()) == {"weight", "bias"} and up.weight.shape == (6, 4, 3, 3)
    right = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, up.bias, padding=1)
    torch.testing.assert_close(up(x), right, rtol=1e-4, atol=1e-5)
    down = gnn.ConvDownsample2d(4, 6, bias=False)
    right = F.avg_pool2d(F.conv2d(x, down.weight, padding=1), 2)
    torch.testing.assert_close(down(x), right, rtol=1e-4, atol=1e-5)
    bilinear = gnn.UpsampleConv2d(4, 6, 5, mode="bilinear")
    right = F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), bilinear.weight, bilinear.bias, padding=2)
    torch.testing.assert_close(bilinear(x), right, rtol=1e-4, atol=1e-5)
    assert "bilinear" in repr(bilinear)


@pytest.mark.parametrize("resample", [None, "upsample", "downsample"])
@pytest.mark.parametrize("bias", [True, False])
def test_equalized_conv2d(resample, bias):
    torch.manual_seed(0)
    layer = gnn.EqualizedConv2d(24, 32, 3, padding=1, bias=bias, resample=resample)
    assert set(layer.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    assert abs(layer.weight.std().item() - 1) < 0.05
    assert not bias or not layer.bias.any()
    if bias:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 24, 8, 8, requires_grad=True)
    weight = layer.weight * math.sqrt(2) / math.sqrt(24 * 9)
    y = F.interpolate(x, scale_factor=2) if resample == "upsample" else x
    right = F.conv2d(y, weight, layer.bias, padding=1)
    right = F.avg_pool2d(right, 2) if resample == "downsample" else right
    torch.testing.assert_close(layer(x), right, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(right)
    for a, b in zip(
        torch.autograd.grad(layer(x), (x, layer.weight), g), torch.autograd.grad(right, (x, layer.weight), g)
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_equalized_without_a_row():
    layer = gnn.EqualizedConv2d(4, 6, 1, gain=1)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight / 2, layer.bias))
    with pytest.raises(ValueError, match="resample"):
        gnn.EqualizedConv2d(4, 6, 3, resample="both")
    with pytest.raises(ValueError, match="stride"):
        gnn.EqualizedConv2d(4, 6, 3, 2, resample="upsample")


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_equalized_linear(shape, bias):
    layer = gnn.EqualizedLinear(4, 6, bias=bias, gain=math.sqrt(2) / 4)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight * math.sqrt(2) / 8, layer.bias))


def test_equalized_keeps_no_second_weight():
    """Of what autograd saves, nothing is a copy of the weight."""
    for layer, x in (
        (gnn.EqualizedConv2d(24, 32, 3, padding=1), torch.randn(2, 24, 8, 8)),
        (gnn.EqualizedConv2d(24, 32, 1), torch.randn(2, 24, 8, 8)),
        (gnn.EqualizedLinear(24, 32), torch.randn(2, 24)),
    ):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            layer(x.requires_grad_())
        known = {layer.weight.data_ptr(), x.data_ptr()}
        assert all(t.data_ptr() in known or t.numel() < layer.weight.numel() for t in saved)


def test_subpixel_convolutions_are_convolutions_with_a_pixel_shuffle():
    layer = gnn.SubpixelConv2d(5, 4, (3, 1), 2, padding=(1, 0), bias=False)
    conv = nn.Conv2d(5, 16, (3, 1), padding=(1, 0), bias=False)
    conv.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(layer(x), F.pixel_shuffle(conv(x), 2))
    assert "upscale_factor=2" in repr(layer)
    for wrong in (1.5, True, 0):
        with pytest.raises(ValueError, match=f"SubpixelConv2d: upscale_factor is {wrong}"):
            gnn.SubpixelConv2d(5, 4, 3, wrong, icnr=False)


@pytest.mark.parametrize(
    ("ours", "theirs", "size"), [(gnn.EqualizedConv1d, nn.Conv1d, (9,)), (gnn.EqualizedConv3d, nn.Conv3d, (5, 6, 7))]
)
def test_equalised_in_other_dimensions(ours, theirs, size):
    torch.manual_seed(0)
    layer = ours(4, 6, 3, padding=1, groups=2, gain=1.5).double()
    assert layer.weight.std().item() == pytest.approx(1, abs=0.2) and not layer.bias.any()
    plain = theirs(4, 6, 3, padding=1, groups=2).double()
    plain.load_state_dict({"weight": layer.weight * 1.5 / (2 * 3 ** len(size)) ** 0.5, "bias": layer.bias})
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))
    with pytest.raises(ValueError, match=f"{ours.__name__}: implementation is 'cpu'"):
        ours(4, 6, 3, implementation="cpu")
