"""Using a trained generator: finding the latent of an image, editing by strokes, adding attributes, steering by a
classifier, and drawing near the middle. Nothing is trained; any generator that can be differentiated by its input
will do.

>>> import torch
>>> generator = torch.nn.Sequential(torch.nn.Linear(4, 48), torch.nn.Tanh(), torch.nn.Unflatten(1, (3, 4, 4)))
>>> image = generator(torch.randn(1, 4)).detach()
>>> found = project(generator, image, 4, random=torch.Generator().manual_seed(0))
>>> bool(found.error < 0.05 * image.var())
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, erf, pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.core.arguments import floats, real, shown, whole
from gankern.core.evaluation import evaluating

Network = Callable[[Tensor], Tensor]
CELL = 4  # pixels a side of the cells of histograms of gradients
LEAST = 3  # latents of an attribute: single ones are unstable (Radford 2015, arXiv 1511.06434, section 6.3.2)


# ---- finding and editing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """Of N images: ``latents`` [N, D], the generator's ``images`` of them, and their mean square ``error`` [N]."""

    latents: Tensor
    images: Tensor
    error: Tensor


def project(
    generator: Network, images: Tensor, latent: int, *, starts: int = 8, steps: int = 100, lr: float = 0.1,
    features: Network | None = None, weight: float = 0.0, initial: Tensor | None = None,
    random: torch.Generator | None = None,
) -> Projection:  # fmt: skip
    r"""The latents whose images are nearest: :math:`z^* = \arg\min \lVert G(z) - x\rVert^2 + \lambda \lVert \phi(G(z))
    - \phi(x)\rVert^2`, means of squares both, by Adam whose rate falls to 0, from several starts; the best is kept.

    Source: Zhu et al. 2016, arXiv 1609.03552, section 4.1 (who start from a network's guess, and take L-BFGS).

    Args:
        generator: [N, latent] → images. In evaluation mode; it is left as it was.
        images: [N, C, H, W].
        latent: the length of the latents; the starts are from N(0, 1).
        starts: for each image; ``initial`` [N, latent] is one of them, if it is given (an encoder's guess).
        features, weight: φ and λ.

    >>> project(nn.Flatten(), torch.ones(2, 3), 3).latents.shape
    torch.Size([2, 3])
    """
    number = floats("project: images", images).shape[0]
    starts, steps = whole("project: starts", starts, least=1), whole("project: steps", steps, least=1)
    z = torch.randn(starts, number, whole("project: latent", latent, least=1), generator=random).to(images)
    if initial is not None:
        if initial.shape != z.shape[1:]:
            raise ValueError(f"project: initial must be [{number}, {latent}], got {shown(initial)}")
        z[0] = initial
    z = z.flatten(0, 1).requires_grad_()
    target = images.repeat(starts, *[1] * (images.ndim - 1))
    optimiser = torch.optim.Adam([z], real("project: lr", lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def distance(made: Tensor) -> Tensor:
        far = (made - target).square().flatten(1).mean(1)
        if features is not None and weight:
            far = far + weight * (features(made) - features(target)).square().flatten(1).mean(1)
        return far

    with _still(generator, features), torch.enable_grad():
        for _ in range(steps):
            (z.grad,) = torch.autograd.grad(distance(generator(z)).sum(), z)
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            made = generator(z)
            best = distance(made).view(starts, number).argmin(0) * number + torch.arange(number, device=z.device)
            found = made[best]
    return Projection(z.detach()[best], found, (found - images).square().flatten(1).mean(1))


def edit(
    generator: Network, latents: Tensor, mask: Tensor, colour: Tensor | None, *, outlines: Tensor | None = None,
    outlines_weight: float = 0.2, steps: int = 100, lr: float = 0.1, stay: float = 3.0,
) -> Tensor:  # fmt: skip
    r"""Latents [N, D] near those given whose images have the colour, and the outlines, under the mask: Adam on

    .. math:: \frac{\lVert m (G(z) - c)\rVert^2}{\sum m} + w \frac{\lVert \bar m (h(G(z)) - h(s))\rVert^2}{\sum \bar m}
        + \mathrm{stay} \cdot \mathrm{mean}(z - z_0)^2

    The first two are means over the masked values; h is :func:`oriented_gradients`, and the second mask the first one's
    mean over its cells.

    Source: Zhu et al. 2016, arXiv 1609.03552, section 4.2.

    Args:
        mask: [H, W] or [N, 1, H, W] from 0 to 1: where the stroke is.
        colour: [C] in [-1, 1], or an image to be like there; None: no term of colours.
        outlines, outlines_weight: s, a sketch [C, H, W] or [N, C, H, W], and w.
        stay: the authors' 10 is for latents in [-1, 1]; these are from N(0, 1), and move farther.
    """
    if colour is None and outlines is None:
        raise ValueError("edit: pass a colour, or outlines, or both")
    mask, like = _stroke("edit", mask, torch.zeros(1) if colour is None else colour, latents)
    wanted: list[tuple[Network, Tensor, Tensor, float]] = []
    if colour is not None:
        wanted.append((nn.Identity(), like, mask, 1.0))
    if outlines is not None:
        sketch = floats("edit: outlines", outlines).to(latents)
        if sketch.ndim not in (3, 4) or sketch.shape[-2:] != mask.shape[-2:]:
            height, width = mask.shape[-2:]
            raise ValueError(f"edit: outlines must be [C, {height}, {width}] or [N, C, ...], got {shown(outlines)}")
        sketch = oriented_gradients(sketch[None] if sketch.ndim == 3 else sketch)
        wanted.append((oriented_gradients, sketch, F.avg_pool2d(mask, CELL, ceil_mode=True), outlines_weight))
    start, z = latents.detach(), latents.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([z], real("edit: lr", lr))
    with _still(generator), torch.enable_grad():
        for _ in range(whole("edit: steps", steps, least=1)):
            made, loss = generator(z), stay * (z - start).square().mean(1).sum()
            for look, target, where, weight in wanted:
                loss = loss + weight * _under(look(made), where, target).sum()
            (z.grad,) = torch.autograd.grad(loss, z)
            optimiser.step()
    return z.detach()


def oriented_gradients(images: Tensor) -> Tensor:
    r"""Soft histograms of gradients: how much of a direction there is in each cell of 4x4 pixels, [N, 8, H/4, W/4].

    Of the mean over the channels, with central differences: :math:`h_k = \mathrm{mean}_{cell}\, |\nabla|
    \max(0, \cos 2(\theta - \pi k / 8))`, :math:`\theta` the angle of the gradient, of which the sign does not count.
    They can be differentiated where there is no gradient, too.

    Args:
        images: [N, C, H, W].

    >>> image = torch.zeros(1, 3, 8, 8)
    >>> image[..., 4:] = 1.0  # an upright edge: the gradient has the angle 0
    >>> oriented_gradients(image)[0, :, 0, 0].argmax()
    tensor(0)
    """
    grey = F.pad(images.mean(1, keepdim=True), [1] * 4, mode="replicate")
    across = 0.5 * (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2])
    down = 0.5 * (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1])
    angles = (torch.arange(8, device=images.device, dtype=images.dtype) * (2 * pi / 8)).view(1, -1, 1, 1)
    # |g| cos 2(theta - a), by the double angle of (across, down) / |g|; 1e-6 is far below a step of 8 bits.
    length = (across.square() + down.square() + 1e-6).sqrt()
    along = (across.square() - down.square()) * angles.cos() + 2 * across * down * angles.sin()
    return F.avg_pool2d((along / length).relu(), CELL, ceil_mode=True)


def stroke(
    generator: Network, latents: Tensor, mask: Tensor, colour: Tensor, *, steps: int = 1, rate: float = 0.05
) -> Tensor:
    r"""What one stroke of the neural photo editor does: :math:`z \leftarrow z - \mathrm{rate}\,(1 + b)\,\partial \lVert
    G(z)[m] - c\rVert^2 / \partial z`, a sum of squares under the mask, b the side of a square of its size in pixels.

    Source: Brock et al. 2016, arXiv 1609.07093, section 3. Arguments: see :func:`edit`.
    """
    mask, colour = _stroke("stroke", mask, colour, latents)
    z, brush = latents.detach(), mask.flatten(1).sum(1).sqrt().view(-1, 1)
    with _still(generator), torch.enable_grad():
        for _ in range(whole("stroke: steps", steps, least=1)):
            z.requires_grad_()
            wrong = (mask * (generator(z) - colour).square()).sum()
            (gradient,) = torch.autograd.grad(wrong, z)
            z = (z - rate * (1.0 + brush) * gradient).detach()
    return z


def transfer(photo: Tensor, before: Tensor, after: Tensor, *, blur: float = 0.7) -> Tensor:
    r"""An edit of the generator's on a photograph: :math:`y = G(z_0) + M \Delta + (1 - M)(x - G(z_0))`, with
    :math:`\Delta = G(z) - G(z_0)` and M the blurred :math:`\min(\mathrm{mean}_c |\Delta|, 1)`. Where nothing changed, M
    is 0 and y is the photograph, with what the generator cannot make; where much did, M is 1 and y is G(z).

    Source: Brock et al. 2016, arXiv 1609.07093, section 3.1.

    Args:
        photo, before, after: x, G(z_0) and G(z), [N, C, H, W].
        blur: standard deviation of the Gaussian, in pixels.
    """
    change = after - before
    radius = max(1, ceil(3 * blur))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).to(photo) / blur) ** 2)
    taps = taps / taps.sum()
    mask = F.pad(change.abs().mean(1, keepdim=True).clamp(max=1.0), [radius] * 4, mode="replicate")
    mask = F.conv2d(F.conv2d(mask, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    return before + mask * change + (1.0 - mask) * (photo - before)


def _stroke(name: str, mask: Tensor, colour: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and colour as images that go with [N, C, H, W]."""
    mask, colour = floats(f"{name}: mask", mask).to(latents), floats(f"{name}: colour", colour).to(latents)
    if mask.ndim not in (2, 4) or not 0.0 <= float(mask.min()) <= float(mask.max()) <= 1.0 or not mask.any():
        raise ValueError(f"{name}: mask must be [H, W] or [N, 1, H, W] from 0 to 1, and not all 0; got {shown(mask)}")
    mask = mask[None, None] if mask.ndim == 2 else mask
    return mask.expand(len(latents), -1, -1, -1), colour.view(1, -1, 1, 1) if colour.ndim == 1 else colour


def _under(images: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """Mean square difference under the mask, [N]; 0 where a mask is empty."""
    wrong = (mask * (images - colour).square()).flatten(1).sum(1)
    return wrong / (images.shape[1] * mask.flatten(1).sum(1)).clamp(min=torch.finfo(mask.dtype).tiny)


@contextmanager
def _still(*networks: Any) -> Iterator[None]:
    """Networks in evaluation mode, whose weights get no gradient; then as before."""
    modules = [network for network in networks if isinstance(network, nn.Module)]
    wanting = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        if not modules:
            yield
        elif len(modules) == 1:
            with evaluating(modules[0]):
                yield
        else:
            with evaluating(modules[0]), evaluating(modules[1]):
                yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


# ---- attributes ------------------------------------------------------------------------------------------------------


def attribute(having: Tensor, lacking: Tensor) -> Tensor:
    """The direction of an attribute: the mean latent of images that have it less the mean of those that lack it, [D].

    Source: Radford et al. 2015, arXiv 1511.06434, section 6.3.2; Larsen et al. 2016, arXiv 1512.09300, section 4.2. A
    ValueError for fewer than three latents of either: those of single images are unstable.

    >>> attribute(torch.ones(3, 2), torch.zeros(5, 2))
    tensor([1., 1.])
    """
    for name, latents in (("having", having), ("lacking", lacking)):
        if floats(f"attribute: {name}", latents).ndim != 2 or len(latents) < LEAST:
            raise ValueError(f"attribute: {name} must be [{LEAST} or more, D], got {tuple(latents.shape)}")
    return having.mean(0) - lacking.mean(0)


# ---- a prior and a condition, by turns -------------------------------------------------------------------------------


def ppgn(
    generator: Network,
    encoder: Network,
    log_prob: Callable[[Tensor], Tensor],
    latents: Tensor,
    *,
    steps: int = 200,
    step: float = 0.1,
    prior: float = 1e-2,
    condition: float = 1.0,
    noise: float = 0.0,
    low: float | None = None,
    high: float | None = None,
    random: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""A chain of plug & play generative networks, one latent [N, D] after the other:

    .. math:: h \leftarrow h + \frac{\mathrm{step}}{\mathrm{mean}|d|} d, \quad d = \epsilon_1 (E(G(h)) - h) + \epsilon_2
        \frac{\partial \log p(y | G(h))}{\partial h} + N(0, \epsilon_3^2)

    The first term is a denoising auto-encoder's estimate of the direction in which h is more likely, the second is the
    condition, the third mixes. The mean is over a sample's own d.

    Source: Nguyen et al. 2016, arXiv 1612.00005, the noiseless joint variant in h.

    Args:
        generator, encoder: G, [N, D] → images, and E, images → [N, D].
        log_prob: images → log p(y | x), [N]: of a class the logarithm of the whole softmax.
        latents: where the chain begins.
        prior, condition, noise: ε₁, ε₂ and ε₃. The paper's 1e-5, 1 and 1e-17 belong to features of 4096 from 0 to 30,
            which it clips to ``low`` and ``high``.

    >>> chain = ppgn(nn.Identity(), nn.Identity(), lambda x: -x.square().sum(1), torch.ones(2, 3), steps=5)
    >>> [round(h.mean().item(), 1) for h in chain]
    [0.9, 0.8, 0.7, 0.6, 0.5]
    """
    h = floats("ppgn: latents", latents).detach()
    for _ in range(whole("ppgn: steps", steps, least=1)):
        with _still(generator, encoder), torch.enable_grad():
            h = h.requires_grad_()
            images = generator(h)
            (direction,) = torch.autograd.grad(log_prob(images).sum(), h)
        with torch.no_grad():
            direction = condition * direction
            if prior:
                direction = direction + prior * (encoder(images.detach()) - h)
            if noise:
                direction = direction + noise * torch.randn(h.shape, generator=random).to(h)
            size = direction.abs().mean(1, keepdim=True)
            h = h + step * direction / size.clamp(min=torch.finfo(h.dtype).tiny)
            h = h if low is None and high is None else h.clamp(low, high)
        yield h


# ---- truncation ------------------------------------------------------------------------------------------------------


def truncated(latents: Tensor, limit: float, random: torch.Generator | None = None) -> Tensor:
    """Latents of N(0, 1) in which every number beyond ±``limit`` is drawn again until it is within; the others stay.

    Source: Brock et al. 2018, arXiv 1809.11096, section 3.1. (To scale latents by the limit is another thing.) What is
    drawn again is drawn once, from the normal distribution between the limits.

    >>> truncated(torch.tensor([[0.1, 3.0]]), 0.5)[0, 0], truncated(torch.randn(1000), 0.5).abs().max() <= 0.5
    (tensor(0.1000), tensor(True))
    """
    if not 0.0 < real("truncation", limit) < float("inf"):
        raise ValueError(f"truncation must be a positive number, got {limit}")
    beyond = floats("truncation: latents", latents).abs() > limit
    # The inverse of the distribution function, of a uniform number between its values at ±limit.
    uniform = (2.0 * torch.rand(latents.shape, generator=random, dtype=torch.float64) - 1.0) * erf(limit / sqrt(2.0))
    return torch.where(beyond, (sqrt(2.0) * torch.erfinv(uniform)).clamp(-limit, limit).to(latents), latents)
