"""Penalties of whole critics (the primitive alone is in bench_primitives.py):

    python benchmarks/bench_gradient_penalty.py [--critic dcgan] [--step] [--seconds 20] [--json FILE]

It runs all contenders in turn on one critic of torch's layers, and prints medians, in milliseconds and in forwards of
the critic, the median of the rounds' ratios to the penalty written by hand, the peak memory, and with --errors the
largest error of the gradients against fp64. `gankern report` reads the record that --json writes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gankern
from gankern import models, penalties
from gankern.core.files import write_json
from gankern.measure import benchmark as measuring
from gankern.measure.benchmark import OURS, Contender, Result

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


CRITICS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Tensor]]]] = {
    "dcgan": ("DCGAN critic, 64x64, batch 64", _dcgan),
    "3x3": ("four 3x3 convolutions, 32x32, batch 16", _plain3x3),
    "resnet": ("WGAN-GP ResNet critic, 32x32, batch 64", _resnet),
    "progan-32": ("ProGAN critic, 32x32, batch 16", lambda: _progan(32)),
    "progan-64": ("ProGAN critic, 64x64, batch 16", lambda: _progan(64)),
}


# ---- contenders ---------------------------------------------------------------------------------------------


def by_hand(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """The penalty as it is usually written, right."""
    a = alpha.view(-1, 1, 1, 1)
    points = (a * fake + (1 - a) * real).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def penalty_of(name: str) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    if name.startswith("by hand"):
        return by_hand
    method = "auto" if name == OURS else name

    def penalty(critic, real, fake, alpha):
        return penalties.gradient_penalty(critic, real, fake, alpha=alpha, method=method)

    return penalty


CONTENDERS = (OURS, "double_backward", "by hand", "by hand, switch on")


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
            penalty = penalties.GradientPenalty(method="auto" if name == OURS else name, alpha=alpha)
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


def measure(
    case: str, mode: str, steps: dict[str, Callable[[], Any]], rounds: int, seconds: float
) -> tuple[Result, list[str]]:
    """Times of all steps, in turn; the peer is what is written by hand. "forward" is timed for comparison."""
    result = Result("penalty", case, mode, "float32", "cpu", OURS)
    for name, step in steps.items():
        result.contenders[name] = Contender(peak_bytes=measuring._peak_bytes(step, "cpu"))  # and a first call
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while len(times["forward"]) < rounds or time.perf_counter() < end:
        for name, step in steps.items():
            times[name].append(measuring._seconds(step, "cpu") * 1e3)
    measuring.enter_times(result, times, ["by hand"] if "by hand" in steps and OURS in steps else [])
    lines = [f"{case}, {mode}: forward {result.contenders['forward'].median:.1f} ms, {len(times['forward'])} rounds"]
    for name, contender in result.contenders.items():
        if name != "forward":
            forwards = contender.median / result.contenders["forward"].median
            line = f"  {name:20} {contender.median:8.1f} ms {forwards:6.2f} F"
            if "by hand" in steps:
                ratio = statistics.median(b / a for a, b in zip(times[name], times["by hand"]))
                memory = contender.peak_bytes / result.contenders["by hand"].peak_bytes
                line += f" {ratio:6.2f} x  memory {memory:5.2f} x"
            lines.append(line + f" ({contender.peak_bytes / 2**20:.0f} MiB)")
    return result, lines


def errors(names: list[str], critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> dict[str, float]:
    """The largest error of the penalty's gradients against fp64, relative to the largest value of each."""
    exact = copy.deepcopy(critic).double()
    exact.zero_grad()
    by_hand(exact, real.double(), fake.double(), alpha.double()).backward()
    worst = {}
    for name in names:
        alone(name, critic, real, fake, alpha)()
        worst[name] = max(
            ((p.grad.double() - q.grad).abs().max() / q.grad.abs().max()).item()
            for p, q in zip(critic.parameters(), exact.parameters())
            if p.grad is not None and q.grad is not None and q.grad.any()
        )
    return worst


def train(critic: nn.Module, like: Tensor, steps: int) -> None:
    """Some steps of WGAN-GP on smooth images against noise: weights that are not random any more."""
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    for _ in range(steps):
        noise = torch.randn_like(like)
        real = nn.functional.avg_pool2d(noise, 5, 1, 2) * 3
        optimizer.zero_grad()
        penalties.critic_step(critic, real, torch.randn_like(like)).loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--critic", choices=CRITICS, action="append", help="repeat for several [default: all]")
    parser.add_argument("--step", action="store_true", help="the whole critic step with Adam, not the penalty alone")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="repeat for several [default: all]")
    parser.add_argument("--seconds", type=float, default=20, help="for a critic, if that many rounds take less")
    parser.add_argument("--rounds", type=int, default=3, help="at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--errors", action="store_true", help="only the errors against fp64, on 8 samples")
    parser.add_argument("--trained", type=int, default=0, metavar="STEPS", help="after that many steps of 8 samples")
    parser.add_argument("--json", type=Path, help="write the record to this file; an earlier one's other cases stay")
    arguments = parser.parse_args()
    kept = gankern.keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    names = arguments.contender or list(CONTENDERS)
    mode = "critic step" if arguments.step else "penalty alone"
    results = []
    for critic_name in arguments.critic or CRITICS:
        case, make_critic = CRITICS[critic_name]
        torch.manual_seed(0)
        critic, real = make_critic()
        fake, alpha = torch.randn_like(real), torch.rand(len(real))
        train(critic, real[:8], arguments.trained)
        if arguments.errors:
            found = errors(names, critic, real[:8], fake[:8], alpha[:8])
            print(f"{case}:", ", ".join(f"{name} {error:.1e}" for name, error in found.items()), flush=True)
            continue
        make = whole if arguments.step else alone
        steps: dict[str, Callable[[], Any]] = {name: make(name, critic, real, fake, alpha) for name in names}
        steps["forward"] = lambda critic=critic, real=real: critic(real)
        result, lines = measure(case, mode, steps, arguments.rounds, arguments.seconds)
        results.append(result)
        print("\n".join(lines), flush=True)
    if arguments.json and results:
        write_json(arguments.json, _record(arguments.json, results, kept, arguments.seconds))


def _record(path: Path, results: list[Result], kept: bool, seconds: float) -> dict[str, Any]:
    """What `gankern bench --json` writes, with those cases of an earlier record that were not measured now."""
    earlier = json.loads(path.read_text())["results"] if path.exists() else []
    new = [measuring.to_dict(result) for result in results]
    measured = {(r["case"], r["mode"]) for r in new}
    return {
        "environment": measuring.environment(),
        "settings": {
            "quick": False,
            "seconds": seconds,
            "freed_memory_kept": kept,
            "copy_bandwidth": measuring.copy_bandwidth("cpu"),
            "multiply_add_rate": measuring.multiply_add_rate("cpu"),
        },
        "results": [r for r in earlier if (r["case"], r["mode"]) not in measured] + new,
    }


if __name__ == "__main__":
    main()
