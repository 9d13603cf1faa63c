"""A whole GAN in one file: WGAN-GP on handwritten digits, on gankern's layers, with a loop of its own.

    python examples/train_gan.py --steps 300 --out digits.png

Read it from top to bottom: the data, the two networks, the critic's step with its gradient penalty, the generator's
step, a moving average, a picture. `--layers torch` runs the same on stock PyTorch, from the same weights and random
numbers: the losses agree, the time does not. What a training run needs besides (checkpoints, resuming, logs, several
processes, mixed precision) is in `gankern train`.
"""

import argparse
import time

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gankern
import gankern.nn as gnn
from gankern import data, penalties
from gankern.training.pictures import save_grid

LATENT = 64


# ---- the networks ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Nearest x2, 3x3 convolution, batch norm, ReLU: the generator's step to twice the resolution."""

    def __init__(self, inputs: int, outputs: int, ours: bool) -> None:
        super().__init__()
        if ours:  # nearest x2 and the convolution as one, with fewer products; norm and ReLU in one pass
            self.conv: nn.Module = gnn.UpsampleConv2d(inputs, outputs, 3)
            self.norm: nn.Module = gnn.BatchNormAct2d(outputs, activation="relu")
        else:
            self.conv = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1))
            self.norm = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def make_generator(width: int, ours: bool) -> nn.Sequential:
    """[N, 64] -> [N, 1, 32, 32] in [-1, 1]."""
    return nn.Sequential(
        nn.Linear(LATENT, 4 * width * 16),
        nn.Unflatten(1, (4 * width, 4, 4)),
        Block(4 * width, 4 * width, ours),
        Block(4 * width, 2 * width, ours),
        Block(2 * width, width, ours),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Tanh(),
    )


def make_critic(width: int, ours: bool) -> nn.Sequential:
    """[N, 1, 32, 32] -> [N]. No batch norm: the penalty is of each sample's gradient."""
    layers = gnn if ours else nn  # gankern.nn has every name of torch.nn
    return nn.Sequential(
        layers.Conv2d(1, width, 4, 2, 1),
        layers.LeakyReLU(0.2),
        layers.Conv2d(width, 2 * width, 4, 2, 1),
        layers.LeakyReLU(0.2),
        layers.Conv2d(2 * width, 4 * width, 4, 2, 1),
        layers.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(4 * width * 16, 1),
        nn.Flatten(0),
    )


# ---- what the critic minimises ---------------------------------------------------------------------------------------


def critic_loss(critic: nn.Module, real: torch.Tensor, fake: torch.Tensor, ours: bool) -> torch.Tensor:
    """E D(fake) - E D(real) + 10 E (|grad D| - 1)^2 between real and fake samples (Gulrajani 2017)."""
    alpha = torch.rand(len(real))
    if ours:
        penalty = penalties.GradientPenalty(weight=10.0, alpha=alpha)
        return penalties.critic_step(critic, real, fake, penalty=penalty).loss
    between = torch.lerp(real, fake, alpha[:, None, None, None]).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1.0).square().mean()
    return critic(fake).mean() - critic(real).mean() + 10.0 * penalty


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(
    steps: int, width: int, batch_size: int, ours: bool, seed: int = 0
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """The averaged generator, and both losses of every step."""
    gankern.keep_freed_memory()  # glibc's habit of giving it back costs more than most kernels
    torch.manual_seed(seed)
    images = data.load("mnist5k")
    generator, critic = make_generator(width, ours), make_critic(width, ours)
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    of_generator, of_critic = (
        torch.optim.Adam(network.parameters(), lr=5e-4, betas=(0.0, 0.9), fused=True) for network in (generator, critic)
    )
    losses, began = [], time.perf_counter()
    for step in range(1, steps + 1):
        for _ in range(2):
            real = images[torch.randint(len(images), (batch_size,))]
            with torch.no_grad():
                fake = generator(torch.randn(batch_size, LATENT))
            loss = critic_loss(critic, real, fake, ours)
            of_critic.zero_grad()
            loss.backward()
            of_critic.step()

        fooled = -critic(generator(torch.randn(batch_size, LATENT))).mean()
        of_generator.zero_grad()
        fooled.backward(inputs=list(generator.parameters()))  # nobody wants the critic's gradients here
        of_generator.step()
        average.update_parameters(generator)

        losses.append((loss.item(), fooled.item()))
        if step % 50 == 0 or step == steps:
            each = 1e3 * (time.perf_counter() - began) / step
            now = f"critic {losses[-1][0]:.3f}, generator {losses[-1][1]:.3f}"
            print(f"step {step} of {steps}: {now}, {each:.0f} ms a step")
    return average, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--layers", choices=["gankern", "torch"], default="gankern")
    parser.add_argument("--out", default="digits.png", help="the picture")
    options = parser.parse_args()
    generator, _ = train(options.steps, options.width, options.batch_size, options.layers == "gankern")
    with torch.no_grad():
        samples = generator.eval()(torch.randn(64, LATENT, generator=torch.Generator().manual_seed(1)))
    save_grid(options.out, samples)
    print(f"64 samples: {options.out}")


if __name__ == "__main__":
    main()
