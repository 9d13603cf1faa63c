"""Instance normalisation with an activation against torch's own in fp64, and its reference against NumPy. What holds for
every primitive (dtypes, orders, strides, threads) is in test_every_primitive.py, over this primitive's cases."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import every_order
from torch.autograd import grad

import gankern
import gankern.functional as GF
from gankern.core import native
from gankern.reference.instance_norm_act import instance_norm_act as reference

COMPILED = "reference" if native.NATIVE_MISSING else "cpu"
# Short planes, segments of a line, parts of a channel, blocks of 512 columns, parts of rows; one channel.
SHAPES = [(2, 3, 5), (1, 1, 2), (3, 2, 67), (2, 3, 1, 7), (4, 1, 9, 11), (2, 20, 8, 8), (1, 3, 40, 110), (3, 40, 9, 5),
          (2, 700, 3, 3), (3, 700, 3, 1), (2, 3, 4, 5, 6), (1, 2, 200, 300), (2, 35, 95, 97)]  # fmt: skip


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 0.3


def torchs(x, weight, bias, slope):
    """torch's own; affine values by hand, for torch's have no second order for one alone and are never each sample's."""
    y = F.instance_norm(x)
    over = (...,) + (None,) * (x.ndim - 2)
    y = y * (1 if weight is None else weight[over]) + (0 if bias is None else bias[over])
    return y if slope == 1 else y.relu() if slope == 0 else F.leaky_relu(y, slope)


def ours(x, weight, bias, slope):
    activation = {1.0: None, 0.0: "relu"}.get(slope, "leaky_relu")
    return GF.instance_norm_act(x, None, None, weight, bias, activation=activation, negative_slope=slope)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order_and_layout(shape):
    affine = [(None, None), (random(shape[1], seed=1), random(shape[1], seed=2)),
              (random(*shape[:2], seed=1), random(*shape[:2], seed=2)), (random(shape[1], seed=1), None),
              (None, random(shape[1], seed=2))]  # fmt: skip
    x = random(*shape)
    layouts = [x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.transpose(0, -1).contiguous().transpose(0, -1)]
    for (weight, bias), slope, x in itertools.product(affine, (1.0, 0.0, 0.2), layouts):
        found = (every_order(functools.partial(f, slope=slope), (x, weight, bias)) for f in (ours, torchs))
        for mine, right in zip(*found, strict=True):
            scale = max(1.0, right.abs().max().item())
            assert (mine - right).abs().max() <= 1e-9 * scale
        assert gankern.last_implementation("instance_norm_act") == COMPILED


def test_is_batch_norm_of_one_sample_with_all_channels():
    x = random(3, 5, 6, 7)
    view = GF.batch_norm_act(x.view(1, 15, 6, 7), None, None, training=True, activation="relu")
    torch.testing.assert_close(GF.instance_norm_act(x, activation="relu"), view.view_as(x), rtol=0, atol=4e-16)


def test_reference_by_the_formula():
    x, weight, bias = random(2, 3, 4, 5), random(3, seed=1), random(3, seed=2)
    y, stats = reference(x, weight, bias, 0.1, 0.25)
    for n, c in itertools.product(range(2), range(3)):
        values = x[n, c].numpy()
        z = (values - values.mean()) / np.sqrt(values.var() + 0.1) * weight[c].item() + bias[c].item()
        np.testing.assert_allclose(y[n, c], np.where(z > 0, z, 0.25 * z), rtol=1e-12)
        np.testing.assert_allclose(stats[0, n, c], values.mean(), rtol=1e-12)
        np.testing.assert_allclose(stats[2, n, c], values.var(ddof=1), rtol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", COMPILED])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics_are_torchs(implementation, momentum):
    mine, theirs = ([random(4, seed=1), random(4, seed=2).square() + 0.1] for _ in range(2))
    weight, bias = random(4, seed=3), random(4, seed=4)
    for step in range(3):
        x = random(3, 4, 5, 6, seed=10 + step)
        y = GF.instance_norm_act(x, *mine, weight, bias, True, momentum, implementation=implementation)
        torch.testing.assert_close(y, F.instance_norm(x, *theirs, weight, bias, True, momentum))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    y = GF.instance_norm_act(x, *mine, weight, bias, False, activation="relu", implementation=implementation)
    torch.testing.assert_close(y, F.instance_norm(x, *theirs, weight, bias, False).relu())
    assert gankern.last_implementation("instance_norm_act") == implementation


def test_a_sample_does_not_know_of_the_others():
    for last in (False, True):
        x = random(4, 5, 6, 7, dtype=torch.float32)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        whole = GF.instance_norm_act(x, activation="relu")
        assert all(
            torch.equal(whole[n : n + 1], GF.instance_norm_act(x[n : n + 1], activation="relu")) for n in range(4)
        )
        x[1, 2, 3, 4] = float("nan")
        y = GF.instance_norm_act(x)
        assert y[1, 2].isnan().all() and y.isnan().sum() == 42


def test_far_from_zero_and_beyond_the_range():
    x = random(2, 3, 30, 30, dtype=torch.float32)
    for large in (x + 1e4, x * 1e20):
        for values in (large, large.contiguous(memory_format=torch.channels_last)):
            right = F.instance_norm(values.double())
            assert (GF.instance_norm_act(values) - right).abs().max() < 2e-3


def test_empty_batches():
    for last in (False, True):
        x = torch.zeros(0, 3, 4, 4).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        weight, mean, var = torch.ones(3, requires_grad=True), torch.zeros(3), torch.ones(3)
        y = GF.instance_norm_act(x, mean, var, weight)
        (g,) = grad(y.sum(), weight)
        assert y.shape == x.shape and not g.any() and not mean.any() and (var == 1).all()


BAD = [
    ({"x": torch.ones(2, 3, 1, 1)}, "x has shape .2, 3, 1, 1.; with use_input_stats a channel needs more than one"),
    ({"x": torch.ones(2, 3)}, r"x has shape \(2, 3\); it must be \[N, C, ...\]"),
    ({"x": torch.ones(2, 0, 4, 4)}, r"it must be \[N, C, ...\] with a channel"),
    ({"x": torch.ones(2, 3, 4, dtype=torch.long)}, "x is .*int64"),
    ({"weight": torch.ones(4)}, r"weight has shape \(4,\).*\(3,\), or \(2, 3\)"),
    ({"weight": torch.ones(3), "bias": torch.ones(2, 3)}, "they must have the same"),
    ({"bias": torch.ones(3, dtype=torch.float64)}, "bias is float64"),
    ({"running_mean": torch.zeros(3)}, "running_var is None and the other is not"),
    ({"running_mean": torch.zeros(2), "running_var": torch.ones(2)}, r"running_mean has shape \(2,\)"),
    ({"use_input_stats": False}, "running_mean and running_var are None; use_input_stats=False needs them"),
    ({"eps": -1.0}, "eps is -1.0"),
    ({"activation": "elu"}, "activation is 'elu'; accepted are 'linear', 'relu', 'leaky_relu', 'prelu', None"),
    ({"implementation": "cuda"}, "has no 'cuda' implementation"),
]


@pytest.mark.parametrize(("wrong", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_is_named(wrong, says):
    with pytest.raises((ValueError, TypeError), match=f"instance_norm_act: .*{says}"):
        GF.instance_norm_act(**{"x": torch.ones(2, 3, 4, 4), **wrong})
