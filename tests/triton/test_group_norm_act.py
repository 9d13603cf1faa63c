"""The Triton kernels of group normalisation with an activation against torch's own: those of instance normalisation,
with statistics of several channels."""

import functools

import pytest
import torch
import torch.nn.functional as F
from common import every_order
from torch.autograd import grad

import gankern
import gankern.functional as GF
from gankern.triton import batch_norm_act, group_norm_act, launch

# A block is 1024 values of a channel, or 32 rows of 32 channels: of several groups and samples, or of a part of one.
SHAPES = [((3, 6, 7), 2), ((2, 40, 3, 5), 4), ((2, 40, 5), 1), ((3, 2, 30, 40), 1), ((2, 4, 2, 3, 4), 2), ((5, 6), 3)]


def random(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype).to(device)


def torchs(x, weight, bias, groups, slope):
    y = F.group_norm(x, groups)
    over = (...,) + (None,) * (x.ndim - 2)
    y = y if weight is None else y * weight[over] + bias[over]
    return (y if slope == 1 else y.relu() if slope == 0 else F.leaky_relu(y, slope)).to(x.dtype)


def triton(x, weight, bias, groups, slope):
    activation = {1.0: None, 0.0: "relu"}.get(slope, "leaky_relu")
    options = {"activation": activation, "negative_slope": slope, "implementation": "triton"}
    return GF.group_norm_act(x, groups, weight, bias, **options)


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_every_order_and_layout(shape, groups, device):
    for size, slope in ((None, 1.0), (shape[1:2], 0.2), (shape[:2], 0.0)):
        weight, bias = (None if size is None else random(*size, device=device, seed=s) for s in (10, 11))
        x = random(*shape, device=device)
        for values in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            options = {"groups": groups, "slope": slope}
            mine, right = (
                every_order(functools.partial(f, **options), (values, weight, bias)) for f in (triton, torchs)
            )
            assert gankern.last_implementation("group_norm_act") == "triton"
            assert mine[0].stride() == values.stride()
            for a, b in zip(mine, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("affine", [(6,), (2, 6)], ids=str)
def test_prelu(affine, samples, device):
    x, weight, bias = (random(*s, device=device, seed=n) for n, s in enumerate(((samples, 6, 5), affine, affine)))
    weight, bias = (v[:samples] if v.ndim == 2 else v for v in (weight, bias))
    slope = random(6, device=device, seed=3)

    def mine(x, w, b, a):
        return GF.group_norm_act(x, 3, w, b, activation="prelu", slope=a, implementation="triton")

    def right_one(x, w, b, a):
        return F.prelu(F.group_norm(x, 3) * w[..., None] + b[..., None], a)

    found = every_order(mine, (x, weight, bias, slope))
    right = every_order(right_one, (x, weight, bias, slope))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype, device):
    x, weight, bias = random(2, 6, 7, 9, dtype=dtype, device=device), random(6, seed=1), random(6, seed=2)
    weight, bias = weight.float().to(device), bias.float().to(device)
    right = torchs(x.double(), weight.double(), bias.double(), 3, 0.2)
    error = (triton(x, weight, bias, 3, 0.2).double() - right).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * right.abs().max()


def test_empty_batches(device):
    weight = torch.ones(4, dtype=torch.float64, device=device, requires_grad=True)
    y = triton(random(0, 4, 5, device=device).requires_grad_(), weight, torch.zeros_like(weight), 2, 0.2)
    assert y.shape == (0, 4, 5) and not grad(y.sum(), weight)[0].any()


# Samples, channels, pixels; groups. Blocks of 32 bytes of channels end within a sample, or not.
TURNS = [((4, 10, 7, 5), 10), ((3, 16, 7, 5), 4), ((5, 8, 7, 5), 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), TURNS, ids=str)
def test_programs_that_take_turns(shape, groups, last, dtype, device, monkeypatch):
    """Of large maps, a block of whole statistics after the other by one launch: as by a launch for each step."""
    x, g, h = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 7, 8))
    if last:
        x, g, h = (v.contiguous(memory_format=torch.channels_last) for v in (x, g, h))
    weight, bias, slope = (
        random(shape[1], device=device, seed=seed).to(batch_norm_act.sum_dtype(dtype)) for seed in (1, 2, 3)
    )

    def orders():
        y, stats = group_norm_act.forward(x, weight, bias, groups, 1e-5, 0.2)
        first = group_norm_act.backward(g, x, weight, bias, stats, groups, 0.2, True)
        given = h, weight, bias, g, x, weight, bias, stats
        found = [y, stats, *first, *group_norm_act.double_backward(*given, groups, 0.2, True)]
        if dtype != torch.float32:
            return found
        y, stats = group_norm_act.forward(x, weight, bias, groups, 1e-5, 0.0, slope)
        return [*found, y, *group_norm_act.backward(g, x, weight, bias, stats, groups, 0.0, True, slope)]

    blocks = batch_norm_act.INSTANCES if groups == shape[1] else batch_norm_act.GROUPS
    turns = {**blocks.variants[0], "TILE": 32, "CHANNELS": 2}
    monkeypatch.setattr(batch_norm_act, "VALUES", 1)
    monkeypatch.setattr(batch_norm_act, "PROGRAMS", 2**20)
    with blocks.use({**turns, "AT_ONCE": 0}):
        right = orders()
    share = max(batch_norm_act.ROW // x.element_size() if last else 1, shape[1] // groups) * shape[2] * shape[3]
    for name, value in {"FEWEST": 1, "WHOLE_WARPS": 1, "WHOLE_DEEP": 2}.items():
        monkeypatch.setattr(batch_norm_act, name, value)
    monkeypatch.setattr(batch_norm_act, "MEGABYTE", -(-2 * share * x.element_size() // turns["AT_ONCE"]))
    with blocks.use(turns):
        with launch.recorded() as launches:
            orders()
        taken = [request for request in launches if request.constants.get("IN_TURN")]
        assert [request.constants["ORDER"] for request in taken] == ["forward", "backward"] * (len(taken) // 2)
        assert {request.programs for request in taken} == {1, 2}
        assert not any(request.kernel.__name__ == "_moments_kernel" for request in launches)
        mine = orders()
    tolerance = 64 * torch.finfo(batch_norm_act.sum_dtype(dtype)).eps + 4 * (dtype == torch.bfloat16) * 2**-8
    for one, other in zip(mine, right, strict=True):
        size = max([1, *other.double().abs().flatten().tolist()])
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * size)


def test_how_many_programs_read_a_large_map_at_once():
    def kernels(*shape, groups, last):
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, device="meta", memory_format=layout)
        with launch.recorded() as launches:
            y, stats = group_norm_act.forward(x, None, None, groups, 1e-5, 0.2)
            group_norm_act.backward(y, x, None, None, stats, groups, 0.2, False)
        return [request.programs for request in launches if request.constants.get("IN_TURN")]

    large = 64, 256, 64, 64
    for groups in (256, 32):
        assert kernels(*large, groups=groups, last=True) == [384, 192]  # of 128 KB each, and twice that
    assert kernels(*large, groups=32, last=False) == [384, 192]
    assert kernels(*large, groups=256, last=False) == []  # a program a channel, which the cache holds
    assert kernels(*large, groups=1, last=True) == []  # statistics of more channels than a program has
    assert kernels(16, 256, 128, 128, groups=256, last=True) == []  # programs were too few
    assert kernels(8, 256, 32, 32, groups=256, last=True) == []  # the cache holds all of it
