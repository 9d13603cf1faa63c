"""Group normalisation with an activation against torch's own in fp64, and its reference against NumPy. What holds for
every primitive (dtypes, orders, strides, threads) is in test_every_primitive.py, over this primitive's cases."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import every_order

import gankern
import gankern.functional as GF
from gankern.core import native
from gankern.reference.group_norm_act import group_norm_act as reference

COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
# Lines shorter than a vector, and longer than a segment; groups in parts, of one sample too; columns of more channels
# than a block has; one position; groups of one channel, and one group.
SHAPES = [((3, 6, 5), 3), ((1, 4, 1, 2), 2), ((5, 6), 2), ((2, 20, 8, 8), 5), ((1, 4, 40, 110), 2), ((3, 40, 9, 5), 1),
          ((2, 700, 3, 3), 7), ((3, 700, 3, 1), 350), ((2, 4, 3, 2, 5), 2), ((1, 2, 200, 100), 1), ((2, 36, 70, 66), 12),
          ((4, 3, 5, 7), 3), ((1, 1200, 20, 3), 1)]  # fmt: skip


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 0.3


def torchs(x, weight, bias, groups, slope):
    """torch's own; affine values by hand, for torch's are never each sample's."""
    y = F.group_norm(x, groups)
    over = (...,) + (None,) * (x.ndim - 2)
    y = y * (1 if weight is None else weight[over]) + (0 if bias is None else bias[over])
    return y if slope == 1 else y.relu() if slope == 0 else F.leaky_relu(y, slope)


def ours(x, weight, bias, groups, slope):
    activation = {1.0: None, 0.0: "relu"}.get(slope, "leaky_relu")
    return GF.group_norm_act(x, groups, weight, bias, activation=activation, negative_slope=slope)


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_every_order_and_layout(shape, groups):
    affine = [(None, None), (random(shape[1], seed=1), random(shape[1], seed=2)),
              (random(*shape[:2], seed=1), random(*shape[:2], seed=2)), (random(shape[1], seed=1), None),
              (None, random(*shape[:2], seed=2))]  # fmt: skip
    x = random(*shape)
    layouts = [x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.transpose(0, -1).contiguous().transpose(0, -1)]
    for k, ((weight, bias), x) in enumerate(itertools.product(affine, layouts)):
        slope = (1.0, 0.0, 0.2)[k % 3]
        found = (
            every_order(functools.partial(f, groups=groups, slope=slope), (x, weight, bias)) for f in (ours, torchs)
        )
        for mine, right in zip(*found, strict=True):
            scale = max(1.0, right.abs().max().item())
            assert (mine - right).abs().max() <= 1e-9 * scale
        assert gankern.last_implementation("group_norm_act") == COMPILED


@pytest.mark.parametrize("slopes", [1, 6])
@pytest.mark.parametrize("last", [False, True])
def test_prelu(slopes, last):
    x, weight, bias, slope = random(3, 6, 4, 5), random(6, seed=1), random(6, seed=2), random(slopes, seed=3)
    x = x.contiguous(memory_format=torch.channels_last) if last else x

    def mine(x, w, b, a):
        return GF.group_norm_act(x, 2, w, b, activation="prelu", slope=a)

    def right(x, w, b, a):
        return F.prelu(F.group_norm(x, 2, w, b), a)

    for a, b in zip(*(every_order(f, (x, weight, bias, slope)) for f in (mine, right)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_groups_of_one_channel_are_instance_norm_and_their_bits():
    for last in (False, True):
        x, weight = random(3, 5, 6, 7, dtype=torch.float32), random(5, seed=1, dtype=torch.float32)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        mine = GF.group_norm_act(x, 5, weight, activation="relu")
        assert torch.equal(mine, GF.instance_norm_act(x, weight=weight, activation="relu"))


def test_reference_by_the_formula():
    x, weight, bias = random(2, 6, 4, 5), random(6, seed=1), random(6, seed=2)
    y, stats = reference(x, weight, bias, 3, 0.1, 0.25)
    assert stats.shape == (3, 2, 3)
    for n, c in itertools.product(range(2), range(6)):
        values = x[n, c // 2 * 2 : c // 2 * 2 + 2].numpy()
        z = (x[n, c].numpy() - values.mean()) / np.sqrt(values.var() + 0.1) * weight[c].item() + bias[c].item()
        np.testing.assert_allclose(y[n, c], np.where(z > 0, z, 0.25 * z), rtol=1e-12)
        np.testing.assert_allclose(stats[0, n, c // 2], values.mean(), rtol=1e-12)
        np.testing.assert_allclose(stats[1, n, c // 2], 1 / np.sqrt(values.var() + 0.1), rtol=1e-12)
        np.testing.assert_allclose(stats[2, n, c // 2], values.var(ddof=1), rtol=1e-12)


def test_a_sample_does_not_know_of_the_others_nor_a_group():
    for last in (False, True):
        x = random(4, 6, 6, 7, dtype=torch.float32)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        whole = GF.group_norm_act(x, 3, activation="relu")
        alone = [GF.group_norm_act(x[n : n + 1], 3, activation="relu") for n in range(4)]
        assert all(torch.equal(whole[n : n + 1], y) for n, y in enumerate(alone))
        x[1, 2, 3, 4] = float("nan")
        y = GF.group_norm_act(x, 3)
        assert y[1, 2:4].isnan().all() and y.isnan().sum() == 84


def test_far_from_zero_and_beyond_the_range():
    x = random(2, 6, 30, 30, dtype=torch.float32)
    for large in (x + 1e4, x * 1e20):
        for values in (large, large.contiguous(memory_format=torch.channels_last)):
            right = F.group_norm(values.double(), 2)
            assert (GF.group_norm_act(values, 2) - right).abs().max() < 2e-3


def test_empty_batches_and_one_value_a_group():
    for last in (False, True):
        x = torch.zeros(0, 4, 4, 4).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        weight = torch.ones(4, requires_grad=True)
        y = GF.group_norm_act(x, 2, weight)
        (g,) = torch.autograd.grad(y.sum(), weight)
        assert y.shape == x.shape and not g.any()
    with pytest.raises(ValueError, match="with 3 groups each has one value"):
        GF.group_norm_act(torch.ones(2, 3), 3)


BAD = [
    ({"x": torch.ones(4)}, r"x has shape \(4,\); it must be \[N, C, ...\]"),
    ({"x": torch.ones(2, 0, 4, 4)}, r"it must be \[N, C, ...\] with a channel"),
    ({"x": torch.ones(2, 4, 4, dtype=torch.long)}, "x is .*int64"),
    ({"num_groups": 3}, "num_groups is 3; it must divide x's 4 channels"),
    ({"num_groups": 0}, "num_groups is 0; it must be at least 1"),
    ({"num_groups": 2.0}, "num_groups is 2.0; it must be an integer"),
    ({"weight": torch.ones(3)}, r"weight has shape \(3,\).*\(4,\), or \(2, 4\)"),
    ({"weight": torch.ones(4), "bias": torch.ones(2, 4)}, "they must have the same"),
    ({"bias": torch.ones(4, dtype=torch.float64)}, "bias is float64"),
    ({"eps": -1.0}, "eps is -1.0"),
    ({"activation": "elu"}, "activation is 'elu'; accepted are 'linear', 'relu', 'leaky_relu', 'prelu', None"),
    ({"activation": "prelu"}, "slope is None"),
    ({"implementation": "cuda"}, "has no 'cuda' implementation"),
]


@pytest.mark.parametrize(("wrong", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_is_named(wrong, says):
    with pytest.raises((ValueError, TypeError), match=f"group_norm_act: .*{says}"):
        GF.group_norm_act(**{"x": torch.ones(2, 4, 4, 4), "num_groups": 2, **wrong})
