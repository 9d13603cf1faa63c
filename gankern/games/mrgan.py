"""MRGAN: an encoder that keeps a GAN from missing modes (Che 2017, arXiv 1612.02136).

An encoder E, which takes no part in sampling, makes every real x a point that the generator has to reach:

    R   = E_x [ w_1 |x - G(E(x))|^2 - w_2 log D(G(E(x))) ]
    L_G = E log(1 - D(G(z))) + R,    L_E = R,    and the discriminator as ever.

The second term of R has a minus: reconstructions, too, are to be taken for real. The paper has -E log D(G(z)) in L_G,
``loss`` non_saturating, with which this small GAN finds all modes without an encoder, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gankern import losses
from gankern.games._game import Loss, Player, Run
from gankern.games._points import OnPoints, tanh_network
from gankern.models._record import Preset


class MRGAN(OnPoints):
    """A GAN that has to reconstruct, too."""

    preset = Preset(OnPoints.preset, steps=1500)  # of the 2,500 over which the rates fall: see docs/models/mrgan.md
    same_work = True

    @dataclass(frozen=True)
    class Options:
        distance: float = 0.2  # w_1
        adversarial: float = 0.2  # w_2
        g_lr: float = 1e-2  # of generator and encoder

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, lr = self.config, self.options.g_lr
        self.networks["encoder"] = tanh_network(config.channels, config.latent, config.width, run.layers)
        self.players = {
            "d": Player(("discriminator",), "discriminator"),
            "g": Player(("generator",), "generator", lr=lr),
            "e": Player(("encoder",), "encoder", lr=lr),
        }
        self.loss = losses.get(config.loss, config.real_target)
        # The minimax loss of samples is log(1 - D); that of reconstructions is -log D there, too.
        self.taken_for_real = losses.get("non_saturating") if config.loss == "minimax" else self.loss

    def regulariser(self, real: Tensor) -> Tensor:
        """R."""
        again = self.networks["generator"](self.networks["encoder"](real))
        distance = (real - again).square().sum(1).mean()
        looked_at = self.taken_for_real.generator(self.networks["discriminator"](again).flatten())
        return self.options.distance * distance + self.options.adversarial * looked_at

    def moves(self) -> Iterator[tuple[str, Loss]]:
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        (real,), latents = self.run.batch(), self.run.normal(self.config.latent)
        with torch.no_grad():
            fake = generator(latents)
        yield "d", self.loss.discriminator(discriminator(real).flatten(), discriminator(fake).flatten())

        fake = generator(self.run.normal(self.config.latent))
        yield "g", self.loss.generator(discriminator(fake).flatten()) + self.regulariser(real)
        yield "e", self.regulariser(real)
