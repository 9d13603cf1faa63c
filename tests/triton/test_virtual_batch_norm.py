"""The Triton kernels of virtual batch norm against plain PyTorch in fp64.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place
times the square root of the reduction's length.
"""

import math

import pytest
import torch
from torch.autograd import grad

import gankern
import gankern.functional as GF
from gankern.reference.virtual_batch_norm import virtual_batch_norm as reference
from gankern.triton import launch, virtual_batch_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.2}


# A tile has 1024 values; channels last of at most 64 channels.
SHAPES = [((3, 5), 3, None), ((2, 70, 4, 5), None, "relu"), ((2, 3, 33, 35), 20, "leaky_relu"), ((3, 2, 7), 1, "relu")]


def sample(shape, dtype, device, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
    return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x


def vectors(channels, dtype, device):
    mean, spread, weight, bias = (sample((channels,), torch.float64, device, seed=seed) for seed in (1, 2, 3, 4))
    values = (0.5 * mean, 0.25 * mean**2 + 0.5 + spread.abs(), 1 + 0.1 * weight, bias)
    return [v.to(dtype) for v in values]


def results(function, tensors, dtype):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    gs = [sample(y.shape, dtype, y.device, seed=5).to(y).requires_grad_() for y in outs]
    first = grad(outs, leaves, gs, create_graph=True)
    hs = [sample(f.shape, dtype, f.device, seed=6 + i).to(f) for i, f in enumerate(first)]
    second = grad(first, [*leaves, *gs], hs, allow_unused=True)
    return [*outs, *first, *(torch.zeros_like(t) if s is None else s for s, t in zip(second, [*leaves, *gs]))]


def check(ours, plain, exact, x):
    for mine, theirs, right in zip(ours, plain, exact):
        assert mine.shape == right.shape and mine.dtype == theirs.dtype
        error, plain_error = ((y.double() - right).abs().max().item() for y in (mine, theirs))
        accumulation = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        floor = 8 * (accumulation * math.sqrt(x.numel()) + torch.finfo(x.dtype).eps) * max(right.abs().max().item(), 1)
        assert error <= 2 * plain_error + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("shape", "count", "activation"), SHAPES, ids=str)
def test_every_order(shape, count, activation, memory_format, dtype, device):
    tensors = [sample(shape, dtype, device, memory_format), *vectors(shape[1], dtype, device)]

    def triton(x, mean, square, weight, bias):
        return GF.virtual_batch_norm(
            x, mean, square, count, weight, bias, activation=activation, implementation="triton"
        )

    def plain(x, mean, square, weight, bias):
        share = 0.0 if count is None else 1 / (count + 1)
        return reference(x, mean, square, share, weight, bias, 1e-5, SLOPES[activation])

    ours = results(triton, tensors, dtype)
    assert gankern.last_implementation("virtual_batch_norm") == "triton"
    assert len(shape) != 4 or ours[0].is_contiguous(memory_format=memory_format)
    exact = results(plain, [t.double() for t in tensors], dtype)
    check(ours, results(plain, tensors, dtype), exact, tensors[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_statistics(memory_format, dtype, device):
    x = sample((3, 5, 6, 7), dtype, device, memory_format)

    def triton(x):
        return GF.virtual_batch_norm_statistics(x, implementation="triton")

    def plain(x):
        return GF.virtual_batch_norm_statistics(x, implementation="reference")

    exact = results(plain, [x.double()], dtype)
    check(results(triton, [x], dtype), results(plain, [x], dtype), exact, x)


def test_large_mean(device):
    x = (1e4 + sample((4, 3, 16, 16), torch.float64, device)).float()
    mean, square = GF.virtual_batch_norm_statistics(x, implementation="triton")
    assert ((square - mean**2) / x.double().var((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    out = GF.virtual_batch_norm(x, mean, square, 4, implementation="triton").double()
    right = reference(x.double(), mean, square, 0.2, None, None, 1e-5, 1.0)
    assert (out - right).abs().max() < 1e-5 * right.abs().max()


def test_empty_and_missing(device):
    ones = torch.ones(3, device=device)
    empty = torch.zeros(0, 3, 4, device=device, requires_grad=True)
    out = GF.virtual_batch_norm(empty, ones, 2 * ones, 3, implementation="triton")
    assert grad(out.sum(), empty)[0].shape == (0, 3, 4)
    x = sample((2, 3, 4), torch.float64, device).requires_grad_()
    second = []
    for implementation in ("triton", "reference"):
        out = GF.virtual_batch_norm(x, ones, 2 * ones, 3, implementation=implementation)
        second.append(grad(grad(out.square().sum(), x, create_graph=True)[0].square().sum(), x)[0])
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_double_backward_without_a_gradient_of_x(memory_format, device):
    """None, which is not read, is as zeros."""
    x, g = (sample((3, 5, 6, 7), torch.float64, device, memory_format, seed=seed) for seed in (0, 7))
    channels = vectors(5, torch.float64, device)
    options = 0.25, 1e-5, 0.2
    _, saved = virtual_batch_norm.forward(x, *channels, *options)
    seconds = [sample((5,), torch.float64, device, seed=seed) for seed in range(10, 14)]
    none, zeros = (
        virtual_batch_norm.double_backward(h, *seconds, g, x, *channels, saved, *options, True, True, True)
        for h in (None, torch.zeros_like(x))
    )
    for ours, right in zip(none, zeros):
        assert torch.equal(ours, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_programs_that_take_turns_give_the_same_values(dtype, device, monkeypatch):
    """In channels_last, as they do for large maps: whatever a program did before, and past the caches. To the bit, but
    for products that a compiler fuses with sums in one form and not in the other."""
    x, g, h = (sample((3, 50, 5, 7), dtype, device, torch.channels_last, seed=seed) for seed in (0, 7, 8))
    channels = vectors(50, dtype, device)
    options = 0.25, 1e-5, 0.2

    def orders():
        y, saved = virtual_batch_norm.forward(x, *channels, *options)
        first = virtual_batch_norm.backward(g, x, *channels, saved, *options, True, True)
        given = h, *channels, g, x, *channels, saved
        return y, saved, *first, *virtual_batch_norm.double_backward(*given, *options, True, True, True)

    monkeypatch.setattr(virtual_batch_norm, "SHARE", 64)  # blocks of few channels
    with virtual_batch_norm.BLOCKS.use({"ROW": 32, "DEEP": 2, "num_warps": 1, "AT_ONCE": 1}):
        whole = orders()
        share = virtual_batch_norm._Map(x).tile["CHANNELS"] * 35 * x.element_size()
        monkeypatch.setattr(virtual_batch_norm, "MEGABYTE", 4 * share)
        monkeypatch.setattr(virtual_batch_norm, "FEWEST", 1)
        monkeypatch.setattr(virtual_batch_norm, "LARGE", 0)
        with launch.recorded() as launches:
            orders()
        given = [request.constants for request in launches if "IN_TURN" in request.constants]
        assert [constants["IN_TURN"] for constants in given] == [True, True, False]
        assert all(constants["LAST_USE"] for constants in given)
        for mine, right in zip(orders(), whole):
            if launch.INTERPRETED:
                assert torch.equal(mine, right)
            ulp = torch.finfo(right.dtype).eps * right.abs().max().item()
            torch.testing.assert_close(mine, right, rtol=0, atol=4 * ulp)


def test_how_many_programs_read_a_large_map_at_once():
    """What all of them read twice has room in the cache; where these were too few, they are as many as there are blocks
    of channels."""

    def programs(*shape):
        x = torch.empty(shape, device="meta", memory_format=torch.channels_last)
        with launch.recorded() as launches:
            y, saved = virtual_batch_norm.forward(x, *vectors(shape[1], x.dtype, "meta"), 0.25, 1e-5, 0.2)
            virtual_batch_norm.backward(y, x, *vectors(shape[1], x.dtype, "meta"), saved, 0.25, 1e-5, 0.2, True, False)
        return [(request.programs, request.constants["IN_TURN"]) for request in launches]

    assert programs(64, 256, 64, 64) == [(384, True), (192, True)]  # of 128 KB each, and twice that
    assert programs(16, 256, 256, 256) == [(512, False), (512, False)]  # of 2 MB
    assert programs(8, 256, 32, 32) == [(256, False), (256, False)]  # 8 MB in all
