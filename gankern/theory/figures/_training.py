"""What the figures train: small networks, from a seed, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gankern import data, penalties, training
from gankern.data import Points
from gankern.losses import clip_weights_, wasserstein_discriminator

Sample = Callable[[int, torch.Generator], Tensor]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A random stream of its own within, and one thread: a figure is the same whatever ran before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too, for good
            yield
    finally:
        torch.set_num_threads(threads)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def train_critic(
    critic: nn.Module,
    real: Sample,
    fake: Sample,
    steps: int,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = wasserstein_discriminator,
    penalty: float = 0.0,
    clip: float | None = None,
    lr: float = 2e-3,
    batch: int = 128,
    seed: int = 0,
) -> list[float]:
    """Trains a critic against a generator that stands still; the loss of each step."""
    random = torch.Generator().manual_seed(seed)
    kind = torch.optim.Adam if clip is None else torch.optim.RMSprop  # what their papers use
    optimiser = kind(critic.parameters(), lr)
    losses = []
    with seeded(seed):
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * min(1.0, 2.0 * (1.0 - step / steps))
            optimiser.zero_grad()
            found = penalties.critic_step(
                critic,
                real(batch, random),
                fake(batch, random),
                loss=loss,
                penalty=penalties.GradientPenalty(weight=penalty) if penalty else None,
            )
            found.loss.backward()
            optimiser.step()
            if clip is not None:
                clip_weights_(critic.parameters(), clip)
            losses.append(found.loss.item())
    return losses


def digits() -> Tensor:
    """1,797 digits [1797, 64] in [−1, 1], row by row."""
    images = data.load("digits")
    assert isinstance(images, Tensor)
    return images.flatten(1)


def vector_gan(samples: Tensor, loss: str, seed: int = 0, **options: Any) -> training.Trainer:
    """A GAN of two MLPs on vectors [N, D], such as flattened images, in the library's own loop, seconds long."""

    def drawn(number: int, random: torch.Generator | None = None) -> Tensor:
        return samples[torch.randint(len(samples), (number,), generator=random)]

    points = Points(drawn)
    chosen: dict[str, Any] = {"gradient_penalty": 0.0, "n_critic": 1, "width": 128, "latent": 16, "batch_size": 64}
    chosen |= {"lr": 1e-3, "evaluate": 0, "threads": 1, "seed": seed, "loss": loss} | options
    # Their name is that of a set the configuration knows; the samples are these.
    return training.Trainer(training.configure("wgan_gp_toy", "8gaussians", points, **chosen), "gankern", points)


def draw_samples(trainer: training.Trainer, number: int) -> Tensor:
    """``number`` samples, of the same latents each time."""
    latents = torch.randn(number, trainer.config.latent, generator=torch.Generator().manual_seed(0))
    return trainer.sample(latents)
