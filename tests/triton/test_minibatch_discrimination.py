"""The Triton kernel of minibatch discrimination against plain PyTorch in fp64.

A result may differ from fp64 by twice what plain PyTorch differs in the same dtype, plus one unit in the last place
times the square root of the reduction's length.
"""

import math

import pytest
import torch
from torch.autograd import grad

import gankern
import gankern.functional as GF

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# NumPy's, about the interpreter: loops whose bound is known at run time, and differences of infinities.

# A tile is 16 points by 64, 32 or 16. The interpreter takes about 10 ms a program and tile.
SHAPES = [
    ((1, 1, 1), None),
    ((5, 2, 3), None),
    ((17, 3, 5), None),
    ((70, 1, 2), None),
    ((6, 2, 9), None),
    ((3, 1, 66), None),  # gradients of more coordinates than one program holds
    ((1, 2, 3), 1),
    ((5, 2, 3), 19),
    ((19, 1, 5), 4),
    ((3, 1, 2), 70),
]


def textbook(m, other=None):
    similarity = torch.exp(-(m[:, None] - (m if other is None else other)[None]).abs().sum(3))
    if other is None:
        similarity = similarity * (1 - torch.eye(len(m), dtype=m.dtype, device=m.device))[:, :, None]
    return similarity.sum(1)


def triton(m, other=None, **options):
    return GF.l1_similarity(m, other, implementation="triton", **options)


def points(*shape, dtype=torch.float64, device="cpu", seed=0):
    """Distances are around 2, as layers make them: exp(-d) has d times the relative error of d."""
    generator = torch.Generator().manual_seed(seed)
    scale = min(0.5, 2 / shape[-1])
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def results(function, m, other):
    """The result, the first-order gradients, and the gradients of those: of m, other and the incoming gradient."""
    inputs = [x.detach().requires_grad_() for x in (m, other) if x is not None]
    out = function(*inputs)
    g = points(*out.shape, seed=3).to(out).requires_grad_()
    first = grad(out, inputs, g, create_graph=True)
    hs = [points(*x.shape, seed=4).to(x) for x in first]
    return [out, *first, *grad(first, [*inputs, g], hs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "count"), SHAPES, ids=str)
def test_every_order(shape, count, dtype, device):
    m = points(*shape, dtype=dtype, device=device)
    other = None if count is None else points(count, *shape[1:], dtype=dtype, device=device, seed=1)
    ours, theirs = results(triton, m, other), results(textbook, m, other)
    assert gankern.last_implementation("minibatch_discrimination") == "triton"
    exact = results(textbook, m.double(), None if other is None else other.double())
    length = max(shape[0], count or 0) * shape[2]
    for mine, plain, right in zip(ours, theirs, exact):
        assert mine.dtype == dtype and mine.shape == right.shape
        # A unit in the last place of the terms of gradients, which cancel, and are as large as the sums are.
        largest = max(right.abs().max().item(), exact[0].abs().max().item())
        floor = torch.finfo(dtype).eps * math.sqrt(length) * largest
        plain_error = (plain.double() - right).abs().max().item()
        # In fp64 plain PyTorch is the exact result itself: the floor, once for it as that and twice as the peer.
        allowed = 4 * floor if dtype == torch.float64 else 2 * plain_error + floor
        assert (mine.double() - right).abs().max().item() <= allowed


def test_one_missing_second_gradient(device):
    m, other = (points(n, 2, 3, device=device, seed=n).requires_grad_() for n in (5, 4))
    for wanted in (m, other):
        first = [grad(f(m, other).square().sum(), wanted, create_graph=True)[0] for f in (triton, textbook)]
        torch.testing.assert_close(*[grad(x.square().sum(), wanted)[0] for x in first])


def test_special_values(device):
    empty, some = torch.zeros(0, 2, 3, device=device), points(4, 2, 3, dtype=torch.float32, device=device)
    assert triton(empty).shape == (0, 2) and triton(empty, some).shape == (0, 2)
    assert torch.equal(triton(some, empty), torch.zeros(4, 2, device=device))
    assert torch.equal(triton(some[:1]), torch.zeros(1, 2, device=device))
    assert torch.equal(triton(some[:1], include_self=True), torch.ones(1, 2, device=device))

    same = some[:1].repeat(18, 1, 1).requires_grad_()
    out = triton(same)
    assert torch.equal(out, torch.full((18, 2), 17.0, device=device))
    assert not grad(out.sum(), same)[0].any()

    far = torch.tensor([-3e38, 0.0, 3e38], device=device)[:, None, None].repeat(7, 1, 2)
    assert torch.equal(triton(far), torch.full((21, 1), 6.0, device=device))

    infinite = some.clone()
    infinite[1, 0, 0] = float("inf")
    infinite.requires_grad_()
    out = triton(infinite)
    assert out.isfinite().all() and out[1, 0] == 0
    assert grad(out.sum(), infinite)[0].isfinite().all()
    assert triton(infinite, include_self=True)[1, 0].isnan()

    with_nan = some.clone()
    with_nan[2, 1, 0] = float("nan")
    with_nan.requires_grad_()
    out = triton(with_nan)
    (first,) = grad(out.sum(), with_nan)
    assert out[:, 1].isnan().all() and out[:, 0].isfinite().all()
    assert first[:, 1].isnan().all() and first[:, 0].isfinite().all()


def test_any_strides_and_nothing_written(device):
    m = points(3, 7, 5, device=device).transpose(0, 2)[:, ::2]
    before = m.clone()
    leaf = m.detach().requires_grad_()
    g = torch.ones(1, 1, dtype=m.dtype, device=device).expand(5, 4)
    torch.testing.assert_close(grad(triton(leaf), leaf, g)[0], grad(textbook(leaf), leaf, g)[0])
    assert torch.equal(m, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_every_time():
    m = points(1000, 20, 5, dtype=torch.float32, device="cuda")
    runs = [results(triton, m, None) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
