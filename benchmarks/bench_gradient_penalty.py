"""The pieces of gradient penalties with pytest-benchmark; and, as a program, penalties of whole critics:

    python benchmarks/bench_gradient_penalty.py [--critic dcgan] [--step] [--seconds 20] [--threads 2]

It runs all contenders in turn and prints medians, in milliseconds and in forwards of the critic, the median of the
rounds' ratios to the penalty written by hand, the peak memory, and the largest error of the gradients against fp64.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gankern
from gankern import benchmark as measuring
from gankern import models, penalties

try:
    import pytest
    import suite

    @pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("gradient_penalty"))
    def test_gradient_penalty(benchmark, case, mode, name):
        suite.run(benchmark, case, mode, name)
except ImportError:  # run as a program, outside of pytest
    pass


# ---- critics ------------------------------------------------------------------------------------------------


def _dcgan() -> tuple[nn.Module, Tensor]:
    """Four convolutions 4×4 of stride 2: 3-64-128-256-512, and a last layer."""
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 128), (128, 256), (256, 512)):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 16, 1)), torch.randn(64, 3, 64, 64)


def _plain3x3() -> tuple[nn.Module, Tensor]:
    """Four convolutions 3×3 of stride 1, 128 wide."""
    layers: list[nn.Module] = []
    for before in (3, 128, 128, 128):
        layers += [nn.Conv2d(before, 128, 3, 1, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AvgPool2d(32), nn.Flatten(), nn.Linear(128, 1)), torch.randn(16, 3, 32, 32)


def _resnet() -> tuple[nn.Module, Tensor]:
    """WGAN-GP's for CIFAR, 128 wide."""
    return models.wgan_gp().discriminator, torch.randn(64, 3, 32, 32)


def _progan(resolution: int) -> tuple[nn.Module, Tensor]:
    """ProGAN's, with minibatch stddev."""
    critic = models.progan(size=resolution).discriminator
    critic.resize(resolution, alpha=1.0)
    return critic, torch.randn(16, 3, resolution, resolution)


CRITICS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "dcgan": _dcgan,
    "3x3": _plain3x3,
    "resnet": _resnet,
    "progan-32": lambda: _progan(32),
    "progan-64": lambda: _progan(64),
}


# ---- contenders ---------------------------------------------------------------------------------------------


def by_hand(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """The penalty as it is usually written, right."""
    a = alpha.view(-1, 1, 1, 1)
    points = (a * fake + (1 - a) * real).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def by_hand_switched(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return by_hand(critic, real, fake, alpha)


def penalty_of(name: str) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    if name.startswith("by hand"):
        return by_hand

    def penalty(critic, real, fake, alpha):
        return penalties.gradient_penalty(critic, real, fake, alpha=alpha, method=name)

    return penalty


CONTENDERS = ("by hand", "by hand, switch on", "double_backward", "tangent")


def alone(name: str, critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Callable[[], Any]:
    """The penalty's value and all gradients."""
    penalty = penalty_of(name)

    def step():
        for p in critic.parameters():
            p.grad = None
        penalty(critic, real, fake, alpha).backward()

    return switched(step) if name.endswith("switch on") else step


def whole(name: str, critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Callable[[], Any]:
    """Losses on real and generated samples, penalty, and Adam."""
    critic = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))

    def step():
        optimizer.zero_grad()
        if name.startswith("by hand"):
            loss = critic(fake).mean() - critic(real).mean() + by_hand(critic, real, fake, alpha)
        else:
            penalty = penalties.GradientPenalty(method=name, alpha=alpha)
            loss = penalties.critic_step(critic, real, fake, penalty=penalty).loss
        loss.backward()
        optimizer.step()

    return switched(step) if name.endswith("switch on") else step


def switched(step: Callable[[], Any]) -> Callable[[], Any]:
    def run():
        with gankern.fast_double_backward():
            step()

    return run


# ---- measuring ----------------------------------------------------------------------------------------------


def errors(name: str, critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> float:
    """The largest error of the penalty's gradients against fp64, relative to the largest value of each."""
    exact = copy.deepcopy(critic).double()
    exact.zero_grad()
    by_hand(exact, real.double(), fake.double(), alpha.double()).backward()
    alone(name, critic, real, fake, alpha)()
    worst = 0.0
    for p, q in zip(critic.parameters(), exact.parameters()):
        if p.grad is not None and q.grad is not None and q.grad.any():
            worst = max(worst, ((p.grad.double() - q.grad).abs().max() / q.grad.abs().max()).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--critic", choices=CRITICS, action="append")
    parser.add_argument("--step", action="store_true", help="the whole critic step with Adam, not the penalty alone")
    parser.add_argument("--contender", choices=CONTENDERS, action="append")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--errors", action="store_true", help="also against fp64, which takes long")
    arguments = parser.parse_args()
    gankern.keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    contenders = arguments.contender or CONTENDERS
    for critic_name in arguments.critic or CRITICS:
        torch.manual_seed(0)
        critic, real = CRITICS[critic_name]()
        fake, alpha = torch.randn_like(real), torch.rand(len(real))
        make = whole if arguments.step else alone
        steps = {name: make(name, critic, real, fake, alpha) for name in contenders}
        steps["forward"] = lambda critic=critic, real=real: critic(real)
        memory = {name: measuring._peak_bytes(step, "cpu") for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end or len(times["forward"]) < 3:
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - begin)
        forward = statistics.median(times["forward"])
        what = "whole step" if arguments.step else "penalty"
        print(
            f"{critic_name}, {what}, batch {len(real)}: forward {1e3 * forward:.1f} ms, {len(times['forward'])} rounds"
        )
        for name in contenders:
            line = f"  {name:20} {1e3 * statistics.median(times[name]):8.1f} ms"
            line += f" {statistics.median(a / b for a, b in zip(times[name], times['forward'])):6.2f} F"
            if "by hand" in contenders:
                ratio = statistics.median(b / a for a, b in zip(times[name], times["by hand"]))
                line += f" {ratio:6.2f} x  memory {memory[name] / memory['by hand']:5.2f} x"
            line += f" ({memory[name] / 2**20:.0f} MiB)"
            if arguments.errors:
                line += f"  error {errors(name, critic, real, fake, alpha):.1e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
