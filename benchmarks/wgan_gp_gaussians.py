"""WGAN-GP on 8 Gaussians by both methods of the penalty, from one seed: one loss curve until rounding errors have
grown, and one coverage of the modes.

    python benchmarks/wgan_gp_gaussians.py --steps 500
"""

from __future__ import annotations

import argparse
import itertools
import math
import time

import torch
from torch import Tensor, nn

from gankern.penalties import gradient_penalty


def centres(dtype: torch.dtype) -> Tensor:
    """[8, 2]: on a circle of radius 2, all divided by 1.414."""
    angles = torch.arange(8, dtype=dtype) * (math.pi / 4)
    return torch.stack([angles.cos(), angles.sin()], 1) * (2 / 1.414)


def points(n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """[n, 2] points of the 8 Gaussians, of deviation 0.02/1.414."""
    modes = torch.randint(8, (n,), generator=generator)
    return centres(dtype)[modes] + torch.randn(n, 2, generator=generator, dtype=dtype) * (0.02 / 1.414)


def mlp(inputs: int, outputs: int, width: int) -> nn.Sequential:
    sizes = [inputs, width, width, width]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def train(
    method: str, steps: int, *, width: int = 512, batch: int = 256, critic_steps: int = 5, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], Tensor]:  # fmt: skip
    """The critic's loss at each generator step, and 2000 points of the trained generator."""
    torch.manual_seed(seed)
    generator, critic = mlp(2, 2, width).to(dtype), mlp(2, 1, width).to(dtype)
    optimizers = [torch.optim.Adam(net.parameters(), 1e-4, (0.5, 0.9)) for net in (generator, critic)]
    random = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        for _ in range(critic_steps):
            real = points(batch, random, dtype)
            with torch.no_grad():
                fake = generator(torch.randn(batch, 2, generator=random, dtype=dtype))
            loss = critic(fake).mean() - critic(real).mean()
            loss = loss + gradient_penalty(critic, real, fake, weight=0.1, generator=random, method=method)
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
        losses.append(loss.item())
        optimizers[0].zero_grad()
        (-critic(generator(torch.randn(batch, 2, generator=random, dtype=dtype))).mean()).backward()
        optimizers[0].step()
    with torch.no_grad():
        return losses, generator(torch.randn(2000, 2, generator=random, dtype=dtype))


def covered(samples: Tensor) -> int:
    """How many modes are the nearest to at least 1 % of the points."""
    nearest = torch.cdist(samples, centres(samples.dtype)).argmin(1)
    return int((torch.bincount(nearest, minlength=8) >= 0.01 * len(samples)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the generator")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = {}
    for method in ("tangent", "double_backward"):
        start = time.perf_counter()
        results[method] = train(method, options.steps, seed=options.seed)
        print(f"{method}: {time.perf_counter() - start:.1f} s, {covered(results[method][1])} modes")
    ours, theirs = (torch.tensor(results[m][0]) for m in ("tangent", "double_backward"))
    difference = (ours - theirs).abs()
    print("  step   tangent   double backward   difference")
    for step in sorted({0, 9, 49, 99, 199, 299, 399, options.steps - 1} & set(range(options.steps))):
        print(f"{step + 1:6d} {ours[step]:9.5f} {theirs[step]:17.5f} {difference[step]:12.1e}")
    print(f"mean of the last 50 losses: {ours[-50:].mean():.5f} and {theirs[-50:].mean():.5f}")


if __name__ == "__main__":
    main()
