"""Adversarial auto-encoder: codes that are distributed as one likes (Makhzani 2015, arXiv 1511.05644).

Three moves on one batch:

    1. encoder and decoder minimise |x - Dec(Enc(x))|^2
    2. the discriminator, which lives on codes, tells p(z) = N(0, I) from Enc(x)
    3. the encoder minimises -log D(Enc(x))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from gankern import losses, metrics
from gankern.games._encoders import Encodes
from gankern.games._game import Figures, Loss, Player, Run
from gankern.games._networks import fully_connected
from gankern.models._record import Preset


class AAE(Encodes):
    """An auto-encoder whose codes are Gaussian."""

    held_out: ClassVar[float] = 0.2
    preset = Preset(loss="non_saturating", latent=8, width=128, lr=5e-4, steps=4000, checkpoint_every=500, evaluate=8)
    same_work = True

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, layers = self.config, run.layers
        pixels, width, latent = config.channels * config.side**2, config.width, config.latent
        # The paper's for MNIST at width 1000.
        self.networks = {
            "encoder": nn.Sequential(
                nn.Flatten(),
                *fully_connected((pixels, width, width), layers, 0.0, norm=False),
                layers.linear(width, latent),
            ),
            "decoder": nn.Sequential(
                *fully_connected((latent, width, width), layers, 0.0, norm=False),
                layers.linear(width, pixels),
                nn.Unflatten(1, (config.channels, config.side, config.side)),
            ),
            "discriminator": nn.Sequential(
                *fully_connected((latent, width, width), layers, 0.0, norm=False), layers.linear(width, 1)
            ),
        }
        self.players = {
            "r": Player(("encoder", "decoder"), "reconstruction", lr=1e-3, betas=(0.9, 0.999)),
            "d": Player(("discriminator",), "discriminator"),
            "e": Player(("encoder",), "encoder"),
        }
        self.loss = losses.get(config.loss, config.real_target)

    def moves(self) -> Iterator[tuple[str, Loss]]:
        encoder, decoder, discriminator = self.networks.values()
        images, *_ = self.run.batch()
        yield "r", (decoder(encoder(images)) - images).square().mean()
        with torch.no_grad():
            codes = encoder(images)
        prior = self.run.normal(self.config.latent)
        yield "d", self.loss.discriminator(discriminator(prior).flatten(), discriminator(codes).flatten())
        yield "e", self.loss.generator(discriminator(encoder(images)).flatten())

    def coding(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        return self.quietly(self.networks["encoder"]), self.quietly(self.networks["decoder"])

    def figures(self) -> Figures:
        """``reconstruction``: mean square error on held-out images; ``sliced_wasserstein``: of their codes to
        N(0, I); ``code_std_least``, ``code_std_largest``: of a code's standard deviation."""
        images, (encode, decode) = self.seen(1000), self.coding()
        random, codes = torch.Generator().manual_seed(0), encode(images)
        prior = torch.randn(codes.shape, generator=random, dtype=codes.dtype)
        stds = codes.std(0)
        return {
            "reconstruction": (decode(codes) - images).square().mean().item(),
            "sliced_wasserstein": metrics.sliced_wasserstein(prior, codes, 64, random),
            "code_std_least": stds.min().item(),
            "code_std_largest": stds.max().item(),
        }
