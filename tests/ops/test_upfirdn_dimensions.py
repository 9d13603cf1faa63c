"""upfirdn1d and upfirdn3d against zero-stuffing and torch's convolutions in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import gankern.functional as GF

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


def test_bad_input():
    f = torch.ones(3)
    for call, says in (
        (lambda: GF.upfirdn1d(torch.ones(2, 3, 4, 4), f), "upfirdn1d: x has shape"),
        (lambda: GF.upfirdn3d(torch.ones(2, 3, 4, 4), f), "upfirdn3d: x has shape"),
        (lambda: GF.upfirdn1d(torch.ones(2, 3, 9), torch.ones(3, 3)), "upfirdn1d: filter has shape"),
        (lambda: GF.upfirdn1d(torch.ones(2, 3, 9), f, up=0), "upfirdn1d: up is 0"),
        (lambda: GF.upfirdn3d(torch.ones(2, 3, 4, 4, 4), f, down=(1, 2)), "upfirdn3d: down is"),
        (lambda: GF.upfirdn3d(torch.ones(2, 3, 4, 4, 4), f, padding=(1, 2)), "upfirdn3d: padding is"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
