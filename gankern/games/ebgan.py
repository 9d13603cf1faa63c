"""Energy-based GAN: the discriminator is an auto-encoder (Zhao 2016, arXiv 1609.03126).

Its energy is how badly it reconstructs, low for what is real:

    D(x) = mean |Dec(Enc(x)) - x|^2
    L_D = D(x) + max(0, m - D(G(z))), sample by sample
    L_G = D(G(z)) + w PT,    PT = 1 / (N (N - 1)) * sum over i != j of cos^2(s_i, s_j)

The margin m is where fakes are bad enough: it belongs to the data and to the mean in D. The repelling term PT pulls
the codes s = Enc(G(z)) of a batch of fakes away from one another; it is not for the discriminator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import models
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run
from gankern.games._measures import read_classes
from gankern.games._networks import fully_connected, small_generator
from gankern.games._pictures import alternating
from gankern.models._record import Preset
from gankern.models.layers import Layers


def repelling_term(codes: Tensor) -> Tensor:
    """The mean squared cosine between the codes [N, ...] of different samples: 0 if all are at right angles, at most 1.

    >>> repelling_term(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]))
    tensor(0.3333)
    """
    directions = F.normalize(codes.flatten(1))
    number = len(directions)
    squares = (directions @ directions.mT).square()
    return (squares.sum() - squares.diagonal().sum()) / (number * (number - 1))


def small_networks(channels: int, size: int, latent: int, width: int, layers: Layers) -> dict[str, nn.Module]:
    """For images of 8x8: the auto-encoder is 64-64-8-64-64 at ``width`` 64."""
    pixels = channels * size * size
    return {
        "generator": small_generator(latent, channels, size, 2 * width, layers),
        "encoder": nn.Sequential(
            nn.Flatten(), *fully_connected((pixels, width), layers, 0.2, norm=False), layers.linear(width, 8)
        ),
        "decoder": nn.Sequential(
            *fully_connected((8, width), layers, 0.2, norm=False),
            layers.linear(width, pixels),
            nn.Unflatten(1, (channels, size, size)),
        ),
    }


def paper_networks(channels: int, size: int, latent: int, width: int, layers: Layers) -> dict[str, nn.Module]:
    """DCGAN's generator, and the paper's auto-encoder at ``width`` 64: three halvings and back."""
    maps = (width, 2 * width, 4 * width)
    encoder = [layers.conv(channels, maps[0], 4, 2, 1), layers.leaky_relu(0.2, inplace=True)]
    encoder += [layers.conv(maps[0], maps[1], 4, 2, 1), layers.batch_norm_act(maps[1], 0.2)]
    encoder += [layers.conv(maps[1], maps[2], 4, 2, 1), layers.batch_norm_act(maps[2], 0.2)]
    decoder = [layers.conv_transpose(maps[2], maps[1], 4, 2, 1), layers.batch_norm_act(maps[1])]
    decoder += [layers.conv_transpose(maps[1], maps[0], 4, 2, 1), layers.batch_norm_act(maps[0])]
    decoder += [layers.conv_transpose(maps[0], channels, 4, 2, 1)]
    generator = models.dcgan(size=size, channels=channels, latent=latent, width=width, layers=layers.name).generator
    return {"generator": generator, "encoder": nn.Sequential(*encoder), "decoder": nn.Sequential(*decoder)}


class EBGAN(Game):
    """An auto-encoder's error is the energy."""

    family: ClassVar[str] = "modes and stability"
    own_loss: ClassVar[bool] = True
    averaged: ClassVar[str | None] = "generator"
    preset = Preset(loss="non_saturating", latent=16, width=64, lr=1e-3, steps=8000, checkpoint_every=1000, evaluate=8)
    same_work = True

    @dataclass(frozen=True)
    class Options:
        repelling: float = 0.1  # weight of PT
        margin: float = 0.0  # 0: half the variance of the data
        g_lr: float = 3e-4

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        if config.side != 8 and config.side % 8:
            raise ValueError(f"ebgan: images of a size that can be halved three times, got {config.side}")
        make = small_networks if config.side == 8 else paper_networks
        self.networks = make(config.channels, config.side, config.latent, config.width, run.layers)
        self.players = {
            "d": Player(("encoder", "decoder"), "auto-encoder"),
            "g": Player(("generator",), "generator", lr=self.options.g_lr),
        }
        self.margin = self.options.margin
        if not self.margin and run.samples is not None:
            some = run.images[run.spread(1000)]
            self.margin = 0.5 * some.var(0).mean().item()

    def energy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """D of each image [N], and the codes."""
        codes = self.networks["encoder"](images)
        return (self.networks["decoder"](codes) - images).square().flatten(1).mean(1), codes

    def moves(self) -> Iterator[tuple[str, Loss]]:
        generator, latent = self.networks["generator"], self.config.latent
        real, *_ = self.run.batch()
        with torch.no_grad():
            fake = generator(self.run.normal(latent))
        yield "d", self.energy(real)[0].mean() + F.relu(self.margin - self.energy(fake)[0]).mean()

        energies, codes = self.energy(generator(self.run.normal(latent)))
        yield "g", energies.mean() + self.options.repelling * repelling_term(codes)

    def drawn(self, number: int) -> Tensor:
        latents = torch.randn(number, self.config.latent, generator=torch.Generator().manual_seed(self.config.seed))
        with self.evaluating():
            return self.average()(latents.to(self.run.device))

    def pictures(self) -> dict[str, Picture]:
        fakes = self.drawn(64)
        drawn = {"samples": Picture(fakes.cpu())}
        if self.run.samples is not None:
            images = self.run.images[self.run.spread(16)].to(self.run.device)
            with self.evaluating():
                shown = [y for x in (images, fakes[:16]) for y in (x, self.networks["decoder"](self.energy(x)[1]))]
            drawn["real, reconstructed, fake, reconstructed"] = Picture(alternating(*shown))
        return drawn

    def figures(self) -> Figures:
        """``energy_real``, ``energy_fake``: D; ``margin``; ``least_class``: of 1,000 samples the share of the class
        that a classifier of real images sees least; ``squared_cosine``: PT of their codes."""
        config = self.config
        images, fakes = self.run.images[self.run.spread(1000)], self.drawn(1000)
        with self.evaluating():
            real, (fake, codes) = self.energy(images.to(self.run.device))[0], self.energy(fakes)
        found = {"energy_real": real.mean().item(), "energy_fake": fake.mean().item(), "margin": self.margin}
        found["squared_cosine"] = repelling_term(codes).item()
        labels = self.run.known_labels()
        if labels is not None:
            seen = read_classes(fakes.cpu(), config.data, config.side)
            found["least_class"] = seen.bincount(minlength=int(labels.max()) + 1).min().item() / len(seen)
        return found
