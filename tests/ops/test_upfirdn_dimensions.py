"""The filters of signals and volumes against zero-stuffing and torch's convolutions in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import gankern.functional as GF
import gankern.nn as gnn
from gankern.functional import filters

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def by_hand(x, filter, up, down, pads, flip, gain):
    """``up``, ``down`` an axis; ``pads`` as F.pad has them."""
    axes = x.ndim - 2
    size = [n * u for n, u in zip(x.shape[2:], up)]
    stuffed = x.new_zeros(*x.shape[:2], *size)
    stuffed[(..., *(slice(None, None, u) for u in up))] = x
    padded = F.pad(stuffed, pads)
    taps = filter if flip else filter.flip(0)
    kernel = taps
    for _ in range(axes - 1):
        kernel = kernel[..., None] * taps
    n, c = x.shape[:2]
    y = CONVOLUTIONS[axes](padded.flatten(0, 1)[:, None], kernel[None, None]) * gain
    return y.view(n, c, *y.shape[2:])[(..., *(slice(None, None, d) for d in down))]


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("implementation", ["reference", None])
def test_signals(implementation):
    x = values(2, 3, 11)
    for k, up, down, padding, flip in itertools.product((1, 4), (1, 3), (1, 2), (2, (3, 1), (4, -1)), (False, True)):
        f = values(k, seed=k)
        pads = (padding, padding) if isinstance(padding, int) else padding
        y = GF.upfirdn1d(x, f, up, down, padding, flip, 1.5, implementation=implementation)
        torch.testing.assert_close(y, by_hand(x, f, [up], [down], pads, flip, 1.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(
    ("up", "down", "padding", "pads"),
    [
        (1, 1, 1, (1,) * 6),
        (2, 1, (0, 1, 2), (2, 2, 1, 1, 0, 0)),
        ((1, 2, 3), (3, 2, 1), (1, 2, 3, -1, 2, 2), (1, 2, 3, -1, 2, 2)),
        (1, 2, 2, (2,) * 6),
    ],
)
def test_volumes(implementation, up, down, padding, pads):
    x, f = values(2, 3, 4, 5, 6), values(3, seed=1)
    ups, downs = ([v] * 3 if isinstance(v, int) else v for v in (up, down))
    for flip in (False, True):
        y = GF.upfirdn3d(x, f, up, down, padding, flip, 0.5, implementation=implementation)
        torch.testing.assert_close(y, by_hand(x, f, ups, downs, pads, flip, 0.5), rtol=1e-12, atol=1e-12)


def test_gradients_of_every_order():
    f = values(3, seed=1)
    for call, x in (
        (lambda x: GF.upfirdn1d(x, f, 2, 3, 2), values(1, 2, 5)),
        (lambda x: GF.upfirdn3d(x, f, 2, 1, 1), values(1, 2, 2, 3, 2)),
    ):
        x.requires_grad_()
        assert gradcheck(call, x) and gradgradcheck(call, x)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("k", [2, 3, 4, 7])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pictures_stay_in_place(k, factor, implementation):
    """Each axis as upsample2d, downsample2d and filter2d have the one that is not of size 1: signals are images of one
    row for a filter of one row, and one filter along all axes is one after the other."""
    f, options = values(k, seed=k), {"flip_filter": True, "gain": 1.5, "implementation": implementation}
    axes = {1: values(2, 3, 12), 3: values(2, 3, 6, 7, 8)}
    for d, x in axes.items():
        for name, argument in (("upsample", {"up": factor}), ("downsample", {"down": factor}), ("filter", {})):
            expected = x
            for axis in range(2, x.ndim):
                line = expected.movedim(axis, -1)
                image = line.reshape(x.shape[0], -1, 1, line.shape[-1])
                both = {key: (1, value) for key, value in argument.items()}
                image = getattr(GF, f"{name}2d")(image, f[None], **both, flip_filter=True)
                expected = image.reshape(*line.shape[:-1], image.shape[-1]).movedim(-1, axis)
            y = getattr(GF, f"{name}{d}d")(x, f, **argument, **options)
            torch.testing.assert_close(y, expected * 1.5, rtol=1e-12, atol=1e-12)
    # A filter of sum 1 keeps the mean away from the edges.
    flat = GF.upsample3d(
        torch.ones(1, 1, 9, 9, 9, dtype=torch.float64), filters.fir([1.0] * (k * factor)).double(), factor
    )
    middle = flat.shape[2] // 2
    assert flat[0, 0, middle, middle, middle].item() == pytest.approx(1)


LAYERS = {
    (d, name): getattr(gnn, f"{name}{d}d")
    for d in (1, 3)
    for name in ("Blur", "FIRUpsample", "FIRDownsample", "SubpixelConv")
}


def of_layer(d, name):
    function = {"Blur": "filter", "FIRUpsample": "upsample", "FIRDownsample": "downsample"}[name]
    return getattr(GF, f"{function}{d}d")


@pytest.mark.parametrize(("d", "name"), [key for key in LAYERS if key[1] != "SubpixelConv"])
def test_layers(d, name):
    x = values(2, 3, *(8, 6, 4)[:d])
    for options in ({}, {"filter": "box"}, {"filter": [1.0, 2.0, 1.0], "implementation": "reference"}):
        layer = LAYERS[d, name](**options)
        assert layer.state_dict() == {} and "filter=" in repr(layer)
        torch.testing.assert_close(layer.double()(x), of_layer(d, name)(x, layer.filter))
    with pytest.raises(ValueError, match=rf"{name}{d}d: filter has shape \(2, 2\); it must be \[k\]"):
        LAYERS[d, name](filter=[[1.0, 1.0], [1.0, 1.0]])
    if name != "Blur":
        y = LAYERS[d, name](4 if name == "FIRUpsample" else 2)(x.float())
        assert y.shape[2:] == tuple(n * 4 if name == "FIRUpsample" else n // 2 for n in x.shape[2:])


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize(("d", "convolution"), [(1, F.conv1d), (3, F.conv3d)])
def test_subpixel_convolutions(d, convolution, factor):
    """With ICNR a convolution and nearest-neighbour upsampling; without, each phase its own channel's convolution."""
    x = values(2, 4, *(7, 5, 6)[:d])
    layer = LAYERS[d, "SubpixelConv"](4, 3, 3, factor, padding=1).double()
    copies = factor**d
    low = convolution(x, layer.weight[::copies], layer.bias[::copies], padding=1)
    torch.testing.assert_close(layer(x), F.interpolate(low, scale_factor=factor))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    layer = LAYERS[d, "SubpixelConv"](4, 3, 3, factor, padding=1, icnr=False).double()
    low = convolution(x, layer.weight, layer.bias, padding=1)
    for i, phase in enumerate(itertools.product(range(factor), repeat=d)):
        at = (..., *(slice(p, None, factor) for p in phase))
        torch.testing.assert_close(layer(x)[at], low[:, i::copies])
    with pytest.raises(ValueError, match=f"SubpixelConv{d}d: upscale_factor is 0"):
        LAYERS[d, "SubpixelConv"](4, 3, 3, 0)


def test_bad_input():
    f = torch.ones(3)
    for call, says in (
        (lambda: GF.upfirdn1d(torch.ones(2, 3, 4, 4), f), "upfirdn1d: x has shape"),
        (lambda: GF.upfirdn3d(torch.ones(2, 3, 4, 4), f), "upfirdn3d: x has shape"),
        (lambda: GF.upfirdn1d(torch.ones(2, 3, 9), torch.ones(3, 3)), "upfirdn1d: filter has shape"),
        (lambda: GF.upfirdn1d(torch.ones(2, 3, 9), f, up=0), "upfirdn1d: up is 0"),
        (lambda: GF.upfirdn3d(torch.ones(2, 3, 4, 4, 4), f, down=(1, 2)), "upfirdn3d: down is"),
        (lambda: GF.upfirdn3d(torch.ones(2, 3, 4, 4, 4), f, padding=(1, 2)), "upfirdn3d: padding is"),
        (
            lambda: GF.upsample1d(torch.ones(2, 3, 9), f, padding=-9),
            r"upsample1d: padding of \(-7, -9\) leaves nothing",
        ),
        (lambda: GF.filter3d(torch.ones(2, 3, 4, 4, 4), f, gain=float("nan")), "filter3d: gain"),
        (lambda: GF.downsample3d(torch.ones(2, 3, 4, 0, 4), f), "downsample3d: x has shape .* not empty along"),
        (lambda: GF.upsample1d(torch.ones(2, 3, 9, device="meta"), f), "upsample1d: filter is on cpu, x on meta"),
        (
            lambda: GF.filter3d(torch.ones(2, 3, 4, 4, 4), f, implementation="fast"),
            "filter3d: implementation is 'fast'",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            call()
