"""The path length penalty: its value and gradients against the formula in fp64, and against differences."""

import copy

import pytest
import torch
from torch import nn

import gankern.nn as gnn
from gankern import models, penalties


def small(layers=1, ours=False):
    """[N, 6] (or [N, L, 6]) → [N, 2, 6, 6]."""
    torch.manual_seed(0)
    conv, transposed = (gnn.Conv2d, gnn.ConvTranspose2d) if ours else (nn.Conv2d, nn.ConvTranspose2d)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6 * layers, 4 * 9), nn.Softplus(), nn.Unflatten(1, (4, 3, 3)),
        transposed(4, 4, 4, 2, 1), nn.Tanh(), conv(4, 2, 3, padding=1), nn.Tanh(),
    ).double()  # fmt: skip


def by_the_formula(generator, latents, noise, target, weight, *args):
    """The whole Jacobian, sample by sample, and torch's own graph of it."""
    lengths = []
    for latent, y, *rest in zip(latents, noise, *args):

        def image(w, rest=rest):
            return generator(w[None], *(x[None] for x in rest))[0]

        jacobian = torch.autograd.functional.jacobian(image, latent, create_graph=True)
        product = torch.tensordot(y / y[0].numel() ** 0.5, jacobian, y.ndim)
        lengths.append((product.square().sum(-1).mean() if product.ndim == 2 else product.square().sum()).sqrt())
    lengths = torch.stack(lengths)
    target = lengths.mean().detach() if target is None else target
    return weight * (lengths - target).square().mean(), lengths.detach()


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("target", [0.0, 0.3, None])
def test_value_and_gradients(ours, layers, target):
    generator = small(layers, ours)
    latents = torch.randn(*((5, 6) if layers == 1 else (5, layers, 6)), dtype=torch.float64)
    noise = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    expected, _ = by_the_formula(generator, latents, noise, target, 2.0)
    right = torch.autograd.grad(expected, list(generator.parameters()), allow_unused=True)
    value = penalties.path_length(generator, latents, target=target, noise=noise)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    value.backward()
    for parameter, gradient in zip(generator.parameters(), right):
        given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(given, torch.zeros_like(parameter) if gradient is None else gradient,
                                   rtol=1e-9, atol=1e-11)  # fmt: skip


def test_gradients_against_differences():
    generator, latents = small(), torch.randn(3, 6, dtype=torch.float64)
    noise = torch.randn(3, 2, 6, 6, dtype=torch.float64)

    def penalty(network):
        return penalties.path_length(network, latents, target=0.2, noise=noise)

    penalty(generator).backward()
    for number, parameter in enumerate(generator.parameters()):
        direction, step = torch.randn_like(parameter), 1e-5
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(generator)
            list(moved.parameters())[number].data += sign * step * direction
            values.append(penalty(moved).item())
        given = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
        assert given == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6, abs=1e-9)


def test_latents_of_a_mapping_network_and_the_conditions_get_gradients():
    mapping, generator = nn.Linear(4, 6).double(), small()
    z, noise = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    scale = torch.rand(3, 1, 1, 1, dtype=torch.float64, requires_grad=True)

    class Scaled(nn.Module):
        def forward(self, w, scale):
            return generator(w) * scale

    expected, _ = by_the_formula(Scaled(), mapping(z), noise, 0.1, 3.0, scale)
    right = torch.autograd.grad(expected, [*mapping.parameters(), scale])
    value = penalties.path_length(Scaled(), mapping(z), target=0.1, weight=3.0, noise=noise, generator_args=(scale,))
    value.backward()
    for tensor, gradient in zip([*mapping.parameters(), scale], right):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-8, atol=1e-10)


def test_the_target_is_the_moving_average_of_the_lengths():
    generator, penalty = small(), penalties.PathLength(weight=1.5, decay=0.25)
    mean = 0.0
    for _ in range(3):
        latents, noise = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 2, 6, 6, dtype=torch.float64)
        _, lengths = by_the_formula(generator, latents, noise, 0.0, 1.0)
        mean += 0.25 * (lengths.mean().item() - mean)
        expected, _ = by_the_formula(generator, latents, noise, mean, 1.5)
        torch.testing.assert_close(penalty(generator, latents, noise=noise), expected, rtol=1e-9, atol=1e-12)
        assert penalty.mean.item() == pytest.approx(mean) and not penalty.mean.requires_grad
    again = penalties.PathLength(weight=1.5, decay=0.25)
    again.load_state_dict(penalty.state_dict())
    torch.testing.assert_close(again(generator, latents, noise=noise), penalty(generator, latents, noise=noise))


def test_a_linear_generator_has_one_length_a_direction():
    """G(w) = A w: Jᵀy = Aᵀy whatever w is; with y one-hot it is a row of A over the root of the number of pixels."""
    linear = nn.Linear(3, 5, bias=False).double()
    value = penalties.path_length(
        linear, torch.randn(5, 3).double(), target=0.0, weight=1.0, noise=torch.eye(5).double()
    )
    torch.testing.assert_close(value, linear.weight.square().sum() / 5)


def test_a_length_of_zero_has_no_direction():
    generator = nn.Linear(3, 4).double()
    nn.init.zeros_(generator.weight)
    value = penalties.path_length(generator, torch.randn(2, 3).double(), target=1.0)
    value.backward()
    assert value.item() == 2.0 and (generator.weight.grad is None or not generator.weight.grad.any())


@pytest.mark.parametrize("name", ["dcgan", "wgan_gp", "progan"])
def test_generators_of_both_sets_of_layers_agree(name):
    shape = {"size": 16, "channels": 1, "width": 4, "latent": 6}
    found = []
    for layers in ("torch", "gankern"):
        torch.manual_seed(0)
        generator = models.build(name, layers=layers, **shape).generator.double().eval()
        torch.manual_seed(1)
        latents = torch.randn(4, 6).double()
        penalties.path_length(generator, latents, target=0.1, random=torch.Generator().manual_seed(2)).backward()
        found.append([p.grad for p in generator.parameters()])
    for a, b in zip(*found):
        if a is not None or b is not None:
            a, b = (torch.zeros(()) if x is None else x for x in (a, b))
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_wrong_arguments():
    generator, latents = nn.Linear(3, 4), torch.randn(2, 3)
    for wrong, message in [
        (torch.randn(2), r"latents must be \[N, D\] or \[N, L, D\] and not empty, got \(2,\)"),
        (torch.randn(0, 3), "not empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            penalties.path_length(generator, wrong)
    with pytest.raises(TypeError, match="latents holds int64"):
        penalties.path_length(generator, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"noise must be of the images' shape \(2, 4\)"):
        penalties.path_length(generator, latents, noise=torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"generator must return \[2, C, ...\]"):
        penalties.path_length(lambda w: w.sum(), latents)
    with pytest.raises(ValueError, match="target is -1.0; it must be 0 or more"):
        penalties.path_length(generator, latents, target=-1.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="called inside torch.no_grad"):
        penalties.path_length(generator, latents)
    with pytest.raises(ValueError, match="decay must be above 0 and at most 1, got 0"):
        penalties.PathLength(decay=0.0)
    with pytest.raises(TypeError, match="target"):
        penalties.PathLength()(generator, latents, target=1.0)
