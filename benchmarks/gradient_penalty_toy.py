"""WGAN-GP on 8 Gaussians with each method of the gradient penalty, from one seed: the same loss curve until rounding
takes over, and the same modes.

    python benchmarks/gradient_penalty_toy.py [--steps 500]
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from gankern import models, penalties


def points(count: int, generator: torch.Generator) -> torch.Tensor:
    """8 Gaussians on a circle of radius 2, standard deviation 0.02, all divided by 1.414."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return (centres + 0.02 * torch.randn(count, 2, generator=generator)) / 1.414


def train(method: str, steps: int, batch: int = 256, critic_steps: int = 5) -> tuple[list[float], int, float, float]:
    """Critic losses, modes that are covered, share of samples within 0.5 of one, and seconds."""
    torch.manual_seed(0)
    gan = models.wgan_gp_toy()
    generator, critic = gan.generator, gan.discriminator
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.5, 0.9)) for m in (generator, critic)]
    random = torch.Generator().manual_seed(1)
    losses, begin = [], time.perf_counter()
    for _ in range(steps):
        for _ in range(critic_steps):
            with torch.no_grad():
                fake = generator(torch.randn(batch, 2, generator=random))
            alpha = torch.rand(batch, generator=random)
            optimizers[1].zero_grad()
            penalty = penalties.GradientPenalty(weight=0.1, method=method, alpha=alpha)
            step = penalties.critic_step(critic, points(batch, random), fake, penalty=penalty)
            step.loss.backward()
            optimizers[1].step()
        losses.append(step.loss.item())
        optimizers[0].zero_grad()
        (-critic(generator(torch.randn(batch, 2, generator=random))).mean()).backward()
        optimizers[0].step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        samples = generator(torch.randn(10_000, 2, generator=random)) * 1.414
    centres = torch.tensor([[2 * math.cos(k * math.pi / 4), 2 * math.sin(k * math.pi / 4)] for k in range(8)])
    distance, nearest = torch.cdist(samples, centres).min(1)
    good = distance < 0.5
    covered = sum(bool((nearest[good] == k).sum() > 100) for k in range(8))
    return losses, covered, good.float().mean().item(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    torch.set_num_threads(2)
    runs = {method: train(method, steps) for method in ("double_backward", "tangent")}
    for method, (losses, modes, good, seconds) in runs.items():
        print(f"{method:16} {seconds:6.1f} s  last loss {losses[-1]:.5f}  modes {modes} of 8  good {good:.1%}")
    one, other = (torch.tensor(losses) for losses, *_ in runs.values())
    difference = (one - other).abs()
    for count in (10, 50, 100, 250, steps):
        if count <= steps:
            print(f"largest difference of the losses in the first {count:4} steps: {difference[:count].max():.1e}")


if __name__ == "__main__":
    main()
