"""Modules of batch normalisation with an activation, against torch's own. What holds for every such norm is in
test_norm_act.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern.nn as gnn


def test_activations():
    x = torch.randn(6, 4, 5, 3)
    for activation, expected in (
        (None, lambda y: y),
        ("relu", torch.relu),
        ("leaky_relu", lambda y: F.leaky_relu(y, 0.2)),
    ):
        norm = gnn.BatchNormAct2d(4, activation=activation, negative_slope=0.2)
        torch.testing.assert_close(norm(x), expected(nn.BatchNorm2d(4)(x)))
        assert f"activation={activation!r}" in repr(norm)
    with pytest.raises(
        ValueError,
        match="BatchNormAct2d: activation is 'elu'; accepted are 'linear', 'relu', 'leaky_relu', 'prelu', None",
    ):
        gnn.BatchNormAct2d(4, activation="elu")


def test_penalty_steps_as_torch():
    """A network with both, trained by its gradient's norm."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), gnn.BatchNormAct2d(4, negative_slope=0.2), nn.Conv2d(4, 1, 3)).double()
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3)).double()
    for a, b in zip(theirs.parameters(), ours.parameters()):
        a.data.copy_(b.data)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for network in (ours, theirs):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(network(leaf).sum(), leaf, create_graph=True)
        (g.flatten(1).norm(dim=1) - 1).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        # Where a penalty does not depend on a bias, torch gives zeros, and we nothing.
        torch.testing.assert_close(
            torch.zeros_like(b) if a.grad is None else a.grad,
            torch.zeros_like(b) if b.grad is None else b.grad,
            rtol=1e-8,
            atol=1e-12,
        )


def test_synchronised_form():
    """convert_sync_batchnorm knows the plain one, and leaves those with an activation as they are."""
    network = nn.Sequential(gnn.BatchNorm2d(4), gnn.BatchNormAct2d(4))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert isinstance(converted[0], nn.SyncBatchNorm) and isinstance(converted[1], gnn.BatchNormAct2d)


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 3, 3), (6, 4, 3)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match=r"BatchNormAct2d: x has shape .* it must be 4-D with 4 channels"):
        gnn.BatchNormAct2d(4)(torch.zeros(shape))


class TestConditional:
    def test_formula(self):
        norm = gnn.ConditionalBatchNorm2d(4, 3, activation="relu")
        assert torch.equal(norm.weight, torch.ones(3, 4)) and torch.equal(norm.bias, torch.zeros(3, 4))
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        x, y = torch.randn(6, 4, 5, 5), torch.tensor([0, 2, 1, 1, 0, 2])
        plain = nn.BatchNorm2d(4, affine=False)
        for _ in range(2):
            expected = plain(x) * norm.weight[y][:, :, None, None] + norm.bias[y][:, :, None, None]
            torch.testing.assert_close(norm(x, y), expected.relu())
            torch.testing.assert_close(norm.running_var, plain.running_var)
            norm.eval(), plain.eval()

    def test_mixtures(self):
        norm = gnn.ConditionalBatchNorm2d(4, 3)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        x, y = torch.randn(6, 4, 5, 5), torch.tensor([0, 2, 1, 1, 0, 2])
        torch.testing.assert_close(norm(x, F.one_hot(y, 3).float()), norm(x, y))

    def test_gradients(self):
        norm = gnn.ConditionalBatchNorm2d(2, 3, activation="leaky_relu").double()
        x, y = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 2, 1])
        assert torch.autograd.gradgradcheck(lambda x, *_: norm(x, y), (x, norm.weight, norm.bias), fast_mode=True)

    @pytest.mark.parametrize(
        "y", [torch.zeros(5, dtype=torch.long), torch.zeros(6, 3, dtype=torch.long), torch.zeros(6, 4)]
    )
    def test_bad_classes(self, y):
        with pytest.raises(ValueError, match="ConditionalBatchNorm2d: y"):
            gnn.ConditionalBatchNorm2d(4, 3)(torch.zeros(6, 4, 2, 2), y)

    def test_bad_number_of_classes(self):
        with pytest.raises(ValueError, match="num_classes is 0"):
            gnn.ConditionalBatchNorm2d(4, 0)


@pytest.mark.parametrize(
    ("ours", "shape"),
    [(gnn.LinearBatchNorm1d, (6, 4)), (gnn.LinearBatchNorm1d, (6, 4, 5)), (gnn.LinearBatchNorm2d, (6, 4, 5, 3)),
     (gnn.LinearBatchNorm3d, (6, 4, 2, 5, 3))],
)  # fmt: skip
def test_conditional_on_a_vector(ours, shape):
    norm = ours(4, 7, activation="relu").double()
    x, c = torch.randn(shape, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    over = (...,) + (None,) * (len(shape) - 2)
    right = F.batch_norm(x, None, None, training=True)
    right = torch.relu(right * (1 + c @ norm.gain.weight.T)[over] + (c @ norm.shift.weight.T)[over])
    torch.testing.assert_close(norm(x, c), right)
    dimensions = [0, *range(2, len(shape))]
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(dimensions))
    assert set(dict(norm.named_parameters())) == {"gain.weight", "shift.weight"}
    with pytest.raises(ValueError, match=rf"{ours.__name__}: c is torch.float64 of shape \(6, 6\)"):
        norm(x, c[:, :6])


@pytest.mark.parametrize(
    ("ours", "shape"), [(gnn.ConditionalBatchNorm1d, (6, 4, 5)), (gnn.ConditionalBatchNorm3d, (6, 4, 2, 5, 3))]
)
def test_conditional_on_classes_in_other_dimensions(ours, shape):
    norm = ours(4, 3).double()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, y = torch.randn(shape, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    over = (...,) + (None,) * (len(shape) - 2)
    right = F.batch_norm(x, None, None, training=True) * norm.weight[y][over] + norm.bias[y][over]
    torch.testing.assert_close(norm(x, y), right)
    with pytest.raises(ValueError, match=f"{ours.__name__}: y has classes from 0 to 3"):
        norm(x, y + (y == 2))


@pytest.mark.parametrize("change", ["tracks no more", "tracks again", "has no statistics", "has no count"])
@pytest.mark.parametrize("ours", [gnn.BatchNorm2d, lambda c: gnn.BatchNormAct2d(c, activation=None)])
def test_obeys_what_is_set_later(ours, change):
    """As torch's: virtual adversarial training, for one, switches the tracking off for a forward."""
    layers = [ours(3), nn.BatchNorm2d(3)]
    x = torch.randn(4, 3, 5, 5)
    seen = []
    for layer in layers:
        layer(x)
        if change == "has no statistics":
            layer.running_mean = layer.running_var = None
        elif change == "has no count":
            layer.num_batches_tracked = None
        else:
            layer.track_running_stats = False
        if change == "tracks again":
            layer(x)
            layer.track_running_stats = True
        seen.append([layer(2 * x), layer.eval()(3 * x), *layer.state_dict().values()])
    torch.testing.assert_close(*seen)
