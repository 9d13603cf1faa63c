"""Projection, editing, attributes, the PPGN chain and truncation, where the right values are known."""

from math import erf, pi, sqrt

import pytest
import torch
from torch import nn

from gankern.diagnostics import latent


class Linear(nn.Module):
    """A generator whose best latents are a least squares problem: [N, 4] → [N, 3, 2, 2]."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 12).double()
        self.norm = nn.BatchNorm2d(3).double()

    def forward(self, z):
        return self.norm(self.map(z).unflatten(1, (3, 2, 2)))


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return Linear().train()


def test_projection_finds_the_least_squares_latent(generator):
    generator.eval()
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    scale = 1 / (1 + generator.norm.eps) ** 0.5
    design = scale * generator.map.weight
    right = torch.linalg.lstsq(design, (images.flatten(1) - scale * generator.map.bias).T).solution.T
    generator.train()  # the fixture's own mode comes back
    before = generator.norm.running_mean.clone()
    found = latent.project(generator, images, 4, starts=3, steps=600, random=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.latents, right, rtol=0, atol=1e-3)
    error = (design @ right.T).T + scale * generator.map.bias - images.flatten(1)
    torch.testing.assert_close(found.error, error.square().mean(1), rtol=1e-4, atol=1e-6)
    assert generator.training and torch.equal(before, generator.norm.running_mean)
    assert all(p.requires_grad and p.grad is None for p in generator.parameters())


def test_the_best_of_several_starts_is_kept():
    """A generator with two valleys: one start in each, of which one is deeper."""

    class Valleys(nn.Module):
        def forward(self, z):
            return torch.where(z > 0, (z - 1).square(), (z + 1).square() + 0.5)

    found = latent.project(Valleys(), torch.zeros(6, 1), 1, starts=12, random=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.latents, torch.ones(6, 1), rtol=0, atol=0.05)
    one = latent.project(Valleys(), torch.zeros(1, 1), 1, starts=1, initial=torch.tensor([[-1.5]]))
    assert one.latents.item() == pytest.approx(-1.0, abs=0.05) and one.error.item() == pytest.approx(0.25, abs=0.02)


def test_features_weigh_in():
    """Pixels say z = 0, the feature says z = 2: with weight 3 the best is three quarters of the way."""

    class Feature(nn.Module):
        def forward(self, x):
            return x - 2.0 if x.requires_grad else torch.zeros_like(x)

    found = latent.project(
        nn.Flatten(), torch.zeros(1, 1, dtype=torch.float64), 1, features=Feature(), weight=3.0, steps=400
    )
    assert found.latents.item() == pytest.approx(1.5, abs=1e-3)


def test_editing_is_ridge_regression_under_the_mask(generator):
    """mean over the mask of (A z + b - c)² + s mean (z - z₀)², in closed form."""
    generator.eval()
    start, mask = torch.randn(1, 4, dtype=torch.float64), torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    colour = torch.tensor([0.5, -0.5, 0.2], dtype=torch.float64)
    found = latent.edit(generator, start, mask, colour, steps=1500, lr=0.02, stay=0.3)
    scale = 1 / (1 + generator.norm.eps) ** 0.5
    weights = (mask.double().expand(3, 2, 2) / (3 * mask.sum())).flatten()
    design, wanted = (
        scale * generator.map.weight,
        colour.view(3, 1, 1).expand(3, 2, 2).flatten() - scale * generator.map.bias,
    )
    left = design.T @ (weights[:, None] * design) + 0.3 / 4 * torch.eye(4)
    right = torch.linalg.solve(left.double(), design.T @ (weights * wanted) + 0.3 / 4 * start[0])
    torch.testing.assert_close(found[0], right, rtol=0, atol=1e-3)


def test_oriented_gradients_by_angles():
    """|g| max(0, cos 2(theta - pi k / 8)) of angles and lengths, a mean over cells, cut ones at the border too."""
    images = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    grey = torch.nn.functional.pad(images.mean(1, keepdim=True), [1] * 4, mode="replicate")[:, 0]
    across, down = (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]) / 2, (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]) / 2
    length, angle = torch.hypot(across, down), torch.atan2(down, across)
    found = latent.oriented_gradients(images)
    assert found.shape == (2, 8, 3, 3)
    for k in range(8):
        soft = length * (2 * (angle - pi * k / 8)).cos().clamp(min=0)
        for i, rows in enumerate((slice(0, 4), slice(4, 8), slice(8, 9))):
            for j, columns in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
                right = soft[:, rows, columns].flatten(1).mean(1)
                torch.testing.assert_close(found[:, k, i, j], right, rtol=1e-3, atol=1e-4)
    turned = latent.oriented_gradients(-images)
    torch.testing.assert_close(turned, found)  # the sign of a gradient does not count


def test_oriented_gradients_can_be_differentiated_where_there_are_none():
    flat = torch.zeros(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(latent.oriented_gradients(flat).sum(), flat)
    assert gradient.isfinite().all()
    rough = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(latent.oriented_gradients, rough)


def test_outlines_turn_an_edge():
    """A generator of one edge at the angle z: the sketch of another edge turns it, and outside the mask nothing counts."""

    class Edge(nn.Module):
        def forward(self, z):
            y, x = torch.meshgrid(torch.arange(16.0) - 7.5, torch.arange(16.0) - 7.5, indexing="ij")
            angle = z[:, :1, None, None]
            return torch.tanh(x * angle.cos() + y * angle.sin()).expand(-1, 3, -1, -1)

    generator, wanted = Edge(), torch.tensor([[0.9]])
    sketch, start = generator(wanted)[0], torch.tensor([[0.3], [1.4]])
    moved = latent.edit(generator, start, torch.ones(16, 16), None, outlines=sketch, outlines_weight=100.0, stay=0.0)
    torch.testing.assert_close(moved, wanted.expand(2, 1), rtol=0, atol=0.03)
    stays = latent.edit(generator, start, torch.ones(16, 16), None, outlines=sketch, outlines_weight=0.0, stay=1.0)
    torch.testing.assert_close(stays, start)
    sketch = sketch.clone()
    sketch[:, :, 8:] = 0.0
    mask = torch.zeros(16, 16)
    mask[:, :4] = 1.0
    moved = latent.edit(generator, start[:1], mask, None, outlines=sketch, outlines_weight=100.0, stay=0.0)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("colour", "outlines", "message"),
    [
        (None, None, "pass a colour, or outlines, or both"),
        (None, torch.zeros(1, 2, 3), r"outlines must be \[C, 2, 2\]"),
        (torch.zeros(3), torch.zeros(2, 2), r"outlines must be \[C, 2, 2\]"),
        (None, torch.zeros(3, 2, 2, dtype=torch.int64), "outlines"),
    ],
)
def test_wrong_outlines(generator, colour, outlines, message):
    with pytest.raises((ValueError, TypeError), match=message):
        latent.edit(generator, torch.zeros(1, 4), torch.ones(2, 2), colour, outlines=outlines)


def test_one_stroke_by_its_formula(generator):
    generator.eval()
    z, mask = torch.randn(2, 4, dtype=torch.float64), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    colour = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    wrong = (generator(leaf) - colour.view(1, 3, 1, 1))[:, :, 0].square().sum()
    (gradient,) = torch.autograd.grad(wrong, leaf)
    expected = z - 0.05 * (1 + sqrt(2)) * gradient
    torch.testing.assert_close(latent.stroke(generator, z, mask, colour), expected)


def test_an_edit_on_a_photograph():
    photo, before, after = torch.rand(3, 1, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(latent.transfer(photo, before, before), photo)  # nothing was painted
    after = before.clone()
    after[..., 6:] += 3.0  # more than a change of 1 in the right half
    changed = latent.transfer(photo, before, after)
    torch.testing.assert_close(changed[..., :3], photo[..., :3])
    torch.testing.assert_close(changed[..., 9:], after[..., 9:])
    constant = latent.transfer(photo, before, before + 0.25)  # a mask of 0.25 everywhere, blurred or not
    torch.testing.assert_close(constant, before + 0.25 * 0.25 + 0.75 * (photo - before))


def test_attributes_take_three_latents():
    having, lacking = torch.randn(5, 4), torch.randn(3, 4)
    torch.testing.assert_close(latent.attribute(having, lacking), having.mean(0) - lacking.mean(0))
    for pair in ((having[:2], lacking), (having, lacking[:2])):
        with pytest.raises(ValueError, match=r"must be \[3 or more, D\], got \(2, 4\)"):
            latent.attribute(*pair)


def test_the_chain_by_its_formula():
    torch.manual_seed(0)
    generator, encoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double(), nn.Linear(6, 3).double()
    classify = nn.Linear(6, 4).double()

    def log_prob(images):
        return classify(images).log_softmax(1)[:, 2]

    h = torch.randn(2, 3, dtype=torch.float64)
    options = {"steps": 3, "step": 0.05, "prior": 0.2, "condition": 0.7, "noise": 0.1, "low": -1.0, "high": 1.5}
    chain = list(latent.ppgn(generator, encoder, log_prob, h, random=torch.Generator().manual_seed(4), **options))
    random = torch.Generator().manual_seed(4)
    for found in chain:
        h = h.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(generator(h)).sum(), h)
        d = 0.2 * (encoder(generator(h)) - h) + 0.7 * gradient + 0.1 * torch.randn(2, 3, generator=random).double()
        h = (h + 0.05 * d / d.abs().mean(1, keepdim=True)).clamp(-1.0, 1.5).detach()
        torch.testing.assert_close(found, h)
    assert len(chain) == 3 and all(p.grad is None and p.requires_grad for p in classify.parameters())


def test_without_the_encoders_term_it_is_not_asked():
    def never(images):
        raise AssertionError("asked")

    (h,) = latent.ppgn(nn.Identity(), never, lambda x: -x.square().sum(1), torch.ones(1, 2), steps=1, prior=0.0)
    torch.testing.assert_close(h, torch.full((1, 2), 0.9))
    (h,) = latent.ppgn(nn.Identity(), never, lambda x: 0 * x.sum(1), torch.ones(1, 2), steps=1, prior=0.0)
    torch.testing.assert_close(h, torch.ones(1, 2))  # no direction, no step


@pytest.mark.parametrize("limit", [0.05, 0.5, 2.0])
def test_truncated_numbers_are_normal_between_the_limits(limit):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(40_000, generator=random)
    drawn = latent.truncated(z, limit, random)
    within = z.abs() <= limit
    assert torch.equal(drawn[within], z[within]) and drawn.abs().max() <= limit
    for at in (0.3 * limit, 0.8 * limit):  # against the distribution function
        share = erf(at / sqrt(2)) / erf(limit / sqrt(2))
        assert (drawn.abs() <= at).float().mean().item() == pytest.approx(share, abs=0.01)
    assert drawn[~within].mean().abs() < 0.05 * max(limit, 0.2)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_no_limit(limit):
    with pytest.raises(ValueError, match="truncation must be a positive number"):
        latent.truncated(torch.zeros(2), limit)


def test_wrong_arguments(generator):
    z = torch.zeros(2, 4, dtype=torch.float64)
    for mask in (torch.zeros(2, 2), 2 * torch.ones(2, 2), torch.ones(2)):
        with pytest.raises(ValueError, match=r"mask must be \[H, W\] or \[N, 1, H, W\] from 0 to 1, and not all 0"):
            latent.edit(generator, z, mask, torch.zeros(3))
    with pytest.raises(ValueError, match=r"initial must be \[2, 4\]"):
        latent.project(generator, torch.zeros(2, 3, 2, 2), 4, initial=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="starts"):
        latent.project(generator, torch.zeros(2, 3, 2, 2), 4, starts=0)


def test_an_empty_stroke_leaves_its_latent_where_it_is():
    generator = nn.Sequential(nn.Linear(4, 48), nn.Unflatten(1, (3, 4, 4)))
    mask = torch.zeros(2, 1, 4, 4)
    mask[0] = 1.0
    moved = latent.edit(generator, torch.ones(2, 4), mask, torch.ones(3), steps=3)
    assert torch.equal(moved[1], torch.ones(4)) and not torch.equal(moved[0], torch.ones(4))
