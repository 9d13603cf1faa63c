"""What the games on points in the plane share: networks, pictures, and which modes they cover."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gankern import metrics
from gankern.data import Points
from gankern.games._game import Figures, Game, Picture, Run
from gankern.models._record import Preset
from gankern.models.layers import Layers

RADIUS, SHARE = 10.0, 0.025  # a mode is covered if 2.5 % of the samples are within ten standard deviations of it


def tanh_network(inputs: int, outputs: int, width: int, layers: Layers) -> nn.Sequential:
    """inputs -> width -> width -> outputs with tanh; orthogonal weights of gain 1.4, biases 0 (the notebook of Metz
    2016, arXiv 1611.02163)."""
    modules: list[nn.Module] = []
    for before in (inputs, width):
        modules += [layers.linear(before, width, bias=False), layers.bias_act(width, "tanh")]
    network = nn.Sequential(*modules, layers.linear(width, outputs))
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            nn.init.orthogonal_(parameter, gain=1.4)
        else:
            nn.init.zeros_(parameter)
    return network


class OnPoints(Game):
    """A generator of points, against a discriminator."""

    family: ClassVar[str] = "modes and stability"
    points: ClassVar[bool] = True
    data: ClassVar[str] = "8gaussians"
    averaged: ClassVar[str | None] = "generator"
    preset = Preset(
        loss="minimax", latent=256, width=128, lr=1e-3, batch_size=256, steps=2500, decay_steps=2500,
        checkpoint_every=500, evaluate=1,
    )  # fmt: skip

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        self.networks = {
            "generator": tanh_network(config.latent, config.channels, config.width, run.layers),
            "discriminator": tanh_network(config.channels, 1, config.width, run.layers),
        }

    def drawn(self, number: int) -> Tensor:
        latents = torch.randn(number, self.config.latent, generator=torch.Generator().manual_seed(self.config.seed))
        with self.evaluating():
            return self.average()(latents.to(self.run.device)).cpu()

    def pictures(self) -> dict[str, Picture]:
        return {"samples": Picture(self.drawn(2000), modes=getattr(self.run.samples, "modes", None))}

    def figures(self) -> Figures:
        """Of 2,000 samples: ``modes_covered``, those with 2.5 % of the samples within ten standard deviations;
        ``within``, the share of samples that are within ten of some mode; and the distance to as many real ones."""
        points, fake, random = self.run.samples, self.drawn(2000), torch.Generator().manual_seed(0)
        assert isinstance(points, Points)
        figures: Figures = {}
        if points.modes is not None and points.std is not None:
            found = metrics.mode_coverage(fake, points.modes, points.std, RADIUS, round(SHARE * len(fake)))
            figures |= {"modes_covered": found.covered, "within": found.high_quality}
        real = points.sample(len(fake), random).to(fake.dtype)
        return figures | {"sliced_wasserstein": metrics.sliced_wasserstein(real, fake, 64, random)}
