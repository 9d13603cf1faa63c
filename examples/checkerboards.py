"""Seven ways to upsample, side by side: their geometry, their spectra, and what the same DCGAN draws with each.

    python examples/checkerboards.py [--steps 300] [--out docs]

Trains seven small generators on 5,000 digits of MNIST against the same discriminator, from the same seed, and writes
checkerboards.png and checkerboards.json. Takes a few minutes on two cores.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import gankern
import gankern.nn as gnn
from gankern import data, diagnostics

LATENT = 32
CHANNELS = (64, 32, 16, 1)  # at 4x4, 8x8, 16x16, 32x32

WAYS: dict[str, Callable[[int, int], nn.Module]] = {
    "transposed 3x3": lambda a, b: nn.ConvTranspose2d(a, b, 3, 2, 1, 1),
    "transposed 5x5": lambda a, b: nn.ConvTranspose2d(a, b, 5, 2, 2, 1),
    "transposed 4x4": lambda a, b: nn.ConvTranspose2d(a, b, 4, 2, 1),
    "resize-convolution": lambda a, b: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(a, b, 3, padding=1)),
    "sub-pixel": lambda a, b: gnn.SubpixelConv2d(a, b, 3, padding=1, icnr=False),
    "sub-pixel, ICNR": lambda a, b: gnn.SubpixelConv2d(a, b, 3, padding=1),
    "FIR": lambda a, b: nn.Sequential(gnn.FIRUpsample2d(), nn.Conv2d(a, b, 3, padding=1)),
}


class Generator(nn.Module):
    def __init__(self, upsampling: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.latent = LATENT
        self.first = nn.Linear(LATENT, CHANNELS[0] * 16)
        self.stages = nn.ModuleList(upsampling(a, b) for a, b in itertools.pairwise(CHANNELS))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in CHANNELS[:-1])

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).unflatten(1, (-1, 4, 4))
        for norm, stage in zip(self.norms, self.stages):
            x = stage(F.relu(norm(x)))
        return x.tanh()


def discriminator() -> nn.Module:
    def conv(a: int, b: int) -> nn.Module:
        return nn.utils.parametrizations.spectral_norm(nn.Conv2d(a, b, 4, 2, 1))

    return nn.Sequential(
        *(layer for a, b in ((1, 16), (16, 32), (32, 64)) for layer in (conv(a, b), nn.LeakyReLU(0.2))),
        nn.Flatten(),
        nn.Linear(64 * 16, 1),
    )


def train(generator: Generator, images: Tensor, steps: int, batch: int = 64) -> None:
    """Hinge loss; Adam(2e-4, 0.5, 0.999), and twice that rate for the discriminator."""
    torch.manual_seed(1)
    critic = discriminator()
    optimizers = [torch.optim.Adam(m.parameters(), r, (0.5, 0.999)) for m, r in ((generator, 2e-4), (critic, 4e-4))]
    for _ in range(steps):
        real = images[torch.randint(len(images), (batch,))]
        fake = generator(torch.randn(batch, LATENT))
        loss = F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake.detach())).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        (-critic(fake).mean()).backward()
        optimizers[0].step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of each generator")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    gankern.keep_freed_memory()
    images = data.load("mnist5k")

    rows = ("overlap of equal weights,\nby output phase", "spectrum, new weights", "spectrum, trained", "samples")
    figure = Figure(figsize=(2 * len(WAYS) + 0.5, 9), layout="constrained")
    axes = figure.subplots(len(rows), len(WAYS))
    record = {"steps": options.steps, "ways": {}}
    for column, (name, upsampling) in enumerate(WAYS.items()):
        torch.manual_seed(0)
        generator = Generator(upsampling)
        new = diagnostics.checkerboard(generator)
        train(generator, images, options.steps)
        trained = diagnostics.checkerboard(generator)
        record["ways"][name] = {"new": new.to_dict(), "trained": trained.to_dict()}
        stage = new.stages[1]
        print(
            f"{name:20} geometry {stage.overlap_ratio:5.2f}   pattern of a constant, new {stage.pattern:4.0%}, trained "
            f"{trained.stages[1].pattern:4.0%}   spectrum, new x{peak(new):.1f}, trained x{peak(trained):.1f}",
            flush=True,
        )

        overlap, first, second, drawn = axes[:, column]
        overlap.imshow(torch.tensor(stage.overlap).repeat(4, 4).numpy(), vmin=0, vmax=2, cmap="coolwarm")
        overlap.set_title(f"{name}\nratio {stage.overlap_ratio:.2f}", fontsize=13)
        for axis, report in ((first, new), (second, trained)):
            power = report.spectrum / report.spectrum.max()
            axis.imshow(power.clamp_min(1e-6).log10().numpy(), vmin=-5, vmax=0, cmap="magma")
            axis.set_title(f"peak x{peak(report):.1f}", fontsize=13)
        with torch.no_grad():
            torch.manual_seed(2)
            samples = generator.eval()(torch.randn(9, LATENT))[:, 0]
        grid = samples.unflatten(0, (3, 3)).permute(0, 2, 1, 3).reshape(96, 96)
        drawn.imshow(grid.numpy(), cmap="gray", vmin=-1, vmax=1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, label in zip(axes[:, 0], rows):
        axis.set_ylabel(label, fontsize=13)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "checkerboards.png", dpi=100)
    (options.out / "checkerboards.json").write_text(json.dumps(record, indent=1) + "\n")


def peak(report: diagnostics.Report) -> float:
    """The largest of the spectrum's peaks at period 2, over what is around."""
    return max(p["ratio"] for p in report.peaks if p["period"] == 2)


if __name__ == "__main__":
    main()
