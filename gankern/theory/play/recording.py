"""What is seen of a GAN in the plane while it trains, as numbers: a few kilobytes a moment."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gankern import training
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import whole
from gankern.core.evaluation import evaluating
from gankern.core.names import look_up
from gankern.data import POINTS, Points
from gankern.metrics import earth_movers_distance
from gankern.theory.densities import jensen_shannon, kullback_leibler

# Name -> what it is called, and how it is trained. A critic takes more steps, and its penalty keeps its slope at 1.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": ("minimax", {}),
    "non_saturating": ("non-saturating", {}),
    "least_squares": ("least squares", {}),
    "wasserstein": ("WGAN-GP", {"gradient_penalty": 1.0, "n_critic": 2}),
}
DATA = ("ring", "line", "two_blobs", "8gaussians")

TRUE, DRAWN, SHOWN, BATCH = 12_000, 4_000, 300, 150  # points: drawn once, of a histogram, in the picture, of a step
HEAT, CELLS, BINS, REACH = (
    30,
    20,
    30,
    2.2,
)  # side of D's map, of the manifold in cells, of the histograms; the picture's
FIGURES = ("d_loss", "g_loss", "w", "kl", "js")


@dataclass(frozen=True)
class Recording:
    """One run at F moments.

    ``steps`` [F]; ``points`` [F, 150, 2], what G makes of the same latents; ``arrows`` [F, 150, 2], −∂L_G/∂x at them;
    ``manifold`` [F, 21, 21, 2], what G makes of a grid whose cells hold equal probability, so that a cell's density is
    one over its area; ``heat`` [F, 30, 30], D at the cells' middles, row by row from below; ``figures`` [F, 5], named
    by ``FIGURES``: the losses of the step, W₁, and KL(data ‖ G) and JS of histograms.
    """

    loss: str
    steps: Tensor
    points: Tensor
    arrows: Tensor
    manifold: Tensor
    heat: Tensor
    figures: Tensor


def moments(steps: int, frames: int) -> list[int]:
    """The steps that are recorded, 0 and the last among them: denser where more happens, at first."""
    wanted = [round(steps * (i / (frames - 1)) ** 1.5) for i in range(frames)]
    for i in range(1, frames):  # each at least one step after the one before
        wanted[i] = max(wanted[i], wanted[i - 1] + 1)
    return [min(step, steps - (frames - 1 - i)) for i, step in enumerate(wanted)]


def grid(side: int) -> Tensor:
    """The middles [side², 2] of the picture's cells, row by row from below."""
    axis = (torch.arange(side) + 0.5) / side * 2 * REACH - REACH
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def latent_grid() -> Tensor:
    """Corners [(CELLS + 1)², 2] of cells of the latent plane, N(0, I), that hold equal probability.

    The outermost lines are where they would be at infinity moved in by a quarter of a cell.
    """
    share = torch.arange(CELLS + 1, dtype=torch.float64) / CELLS
    share = share.clamp(0.25 / CELLS, 1 - 0.25 / CELLS)
    axis = (math.sqrt(2.0) * torch.erfinv(2 * share - 1)).float()
    return torch.cartesian_prod(axis, axis)


def histogram(points: Tensor) -> Tensor:
    """Shares [BINS, BINS] of the points in the picture's cells, 1e-4 added to each so that no logarithm is infinite."""
    inside = points[(points.abs() < REACH).all(1)].double()
    counts = torch.histogramdd(inside, [BINS, BINS], range=[-REACH, REACH, -REACH, REACH]).hist
    shares = counts / len(points) + 1e-4
    return shares / shares.sum()


def record(
    loss: str, data: str | Points, *, steps: int = 1200, frames: int = 80, seed: int = 0, width: int = 64
) -> Iterator[int | Recording]:
    """Trains ``wgan_gp_toy`` by this library's loop with a loss of ``LOSSES``: yields the steps done at each moment,
    then the :class:`Recording`.

    Runs of one seed begin with the same weights and see the same points and latents, whatever the loss.

    Args:
        loss: a name in ``LOSSES``.
        data: a name in ``gankern.data.POINTS``, or points in the plane.
        steps: of the generator.
        frames: moments that are recorded, from 2 to steps + 1.
        seed: of the weights, batches and latents.
        width: of both networks' three hidden layers.

    Raises:
        ValueError, TypeError: a name that does not exist, or a number out of range. RuntimeError: a loss became NaN.

    >>> *_, recording = record("minimax", "ring", steps=2, frames=2, width=8)
    >>> recording.points.shape, recording.steps.tolist()
    (torch.Size([2, 150, 2]), [0, 2])
    """
    _, options = look_up(LOSSES, loss, "loss")
    points = data if isinstance(data, Points) else look_up(POINTS, data, "data")
    whole("steps", steps, least=1)
    whole("frames", frames, least=2, most=steps + 1)
    check_seed("seed", seed)
    options = {"gradient_penalty": 0.0, "n_critic": 1} | options
    trainer = training.Trainer(
        training.configure(
            "wgan_gp_toy",
            data if isinstance(data, str) else DATA[0],  # a name that the configuration knows; the points are these
            points,
            loss=loss,
            latent=2,
            batch_size=BATCH,
            width=width,
            lr=1e-3,
            beta1=0.0,  # with momentum the unpenalised players chase each other in circles
            beta2=0.9,
            seed=seed,
            evaluate=0,
            **options,
        ),
        "gankern",
        points,
    )
    random = torch.Generator().manual_seed(seed)
    true, latents = points.sample(TRUE, random), torch.randn(DRAWN, 2, generator=random)
    corners, heat, shares = latent_grid(), grid(HEAT), histogram(true)
    rows: list[tuple[Tensor, ...]] = []
    losses = (math.nan, math.nan)
    wanted = moments(steps, frames)
    for step in range(steps + 1):
        if step:
            done = trainer.step()
            losses = done.d_loss, done.g_loss
            if not all(map(math.isfinite, losses)):
                raise RuntimeError(f"{loss}: a loss is not finite at step {step}: another seed, or fewer steps")
        if step == wanted[len(rows)]:
            if not step:
                losses = _first_losses(trainer, true, latents)
            rows.append(_moment(trainer, true, latents, corners, heat, shares, losses))
            yield step
    columns = [torch.stack(column) for column in zip(*rows)]
    yield Recording(loss, torch.tensor(wanted), *columns)


def _first_losses(trainer: training.Trainer, true: Tensor, latents: Tensor) -> tuple[float, float]:
    """The losses before the first step, without the penalty."""
    game: Any = trainer.game
    with torch.no_grad():
        fake = trainer.discriminator(trainer.generator(latents[:BATCH]))
        real = trainer.discriminator(true[:BATCH])
        return game.loss.discriminator(real, fake).item(), game.loss.generator(fake).item()


def _moment(
    trainer: training.Trainer,
    true: Tensor,
    latents: Tensor,
    corners: Tensor,
    heat: Tensor,
    shares: Tensor,
    losses: tuple[float, float],
) -> tuple[Tensor, ...]:
    """(points, arrows, manifold, heat, figures) as the networks are now."""
    game: Any = trainer.game
    with evaluating(trainer.generator), evaluating(trainer.discriminator):
        with torch.no_grad():
            made = trainer.generator(latents)
            manifold = trainer.generator(corners).view(CELLS + 1, CELLS + 1, 2)
            values = trainer.discriminator(heat).view(HEAT, HEAT)
        fake = made[:BATCH].detach().requires_grad_()
        # A loss is a mean over the batch: times its number it is what each point feels.
        (gradient,) = torch.autograd.grad(game.loss.generator(trainer.discriminator(fake)) * BATCH, fake)
    generated = histogram(made)
    figures = (
        *losses,
        earth_movers_distance(true[: BATCH * 2], made[: BATCH * 2]),
        kullback_leibler(shares, generated),
        jensen_shannon(shares, generated),
    )
    return made[:BATCH], -gradient, manifold, values, torch.tensor(figures, dtype=torch.float32)
