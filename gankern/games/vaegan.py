"""VAE-GAN: an auto-encoder whose error is measured in the discriminator's features (Larsen 2016, arXiv 1512.09300).

The encoder gives a mean and a log variance, z = mean + std * eps; f(x) are the features of a middle layer of the
discriminator D, and z_p is drawn from N(0, I):

    L_prior = KL(N(mean, std^2) | N(0, I))         L_rec = 1/2 |f(x) - f(Dec(z))|^2         both summed, not averaged
    D minimises        softplus(-D(x)) + softplus(D(Dec(z))) + softplus(D(Dec(z_p)))
    Dec minimises      gamma L_rec + softplus(-D(Dec(z))) + softplus(-D(Dec(z_p)))
    Enc minimises      L_prior + L_rec

L_rec never trains the features that it is measured with. And the authors' balance: where D's mean cost of real images
or of fakes is below 0.68 - 0.35 he does not move, where one is above 0.68 + 0.35 Dec does not; were that both, both
move. With the option ``vae`` there is no discriminator, and encoder and decoder together minimise
L_prior + 1/(2 s^2) |x - Dec(z)|^2: the plain variational auto-encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.games._encoders import EncodesClasses
from gankern.games._game import Loss, Player, Run
from gankern.games._vaegan_networks import networks
from gankern.models._record import Preset

EQUILIBRIUM = 0.68  # the mean cost of a discriminator that can not tell is log 2


class VAEGAN(EncodesClasses):
    """Errors in the discriminator's features."""

    data: ClassVar[str] = "shapes"
    own_loss: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({"evaluate_samples"})
    preset = Preset(
        loss="non_saturating", size=32, latent=32, width=64, lr=5e-4, batch_size=16, steps=1000, checkpoint_every=500,
        evaluate=2,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options:
        gamma: float = 0.01  # weight of L_rec to the decoder, beside what the discriminator says
        balance: float = 0.35  # how far the costs may be from 0.68 for both to move; 0: both always do
        vae: bool = False  # the plain variational auto-encoder
        pixel_std: float = 0.3  # s of the plain one
        hidden: int = 128  # features before the codes, and twice those before the logit
        kernel: int = 4  # of what halves and doubles; the paper's is 5

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, options = self.config, self.options
        if config.side < 16 or config.side % 8:
            raise ValueError(f"vaegan: images of a size that can be halved three times, from 16 on; got {config.side}")
        if options.kernel not in (4, 5):
            raise ValueError(f"vaegan: option kernel must be 4 or 5, got {options.kernel}")
        if config.width % 8:
            raise ValueError(f"vaegan: width must be a multiple of 8, got {config.width}")
        self.networks = networks(
            config.channels, config.side, config.latent, config.width, options.hidden, options.kernel, run.layers
        )
        if options.vae:
            self.refuse("gamma", "balance", where="with vae, without a discriminator")
            del self.networks["features"], self.networks["head"]
            self.players = {"v": Player(("encoder", "decoder"), "auto-encoder")}
        else:
            self.refuse("pixel_std", where="without vae")
            self.players = {
                "d": Player(("features", "head"), "discriminator"),
                "g": Player(("decoder",), "decoder"),
                "e": Player(("encoder",), "encoder"),
            }

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """z drawn for each image [N, latent], and L_prior, the mean over the images."""
        mean, log_var = self.networks["encoder"](images).chunk(2, 1)
        prior = 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).sum(1).mean()
        return mean + (0.5 * log_var).exp() * self.run.normal(self.config.latent), prior

    def coding(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """By the means of the codes."""
        encoder = self.networks["encoder"]
        return self.quietly(lambda images: encoder(images).chunk(2, 1)[0]), self.quietly(self.networks["decoder"])

    def work(self) -> Hashable | None:
        """Always the same where nobody waits for the other, which a step decides by its costs."""
        return () if self.options.vae or not self.options.balance else None

    def move_now(self, costs: Tensor) -> tuple[bool, bool]:
        """Whether the discriminator, and whether the decoder moves, at his mean costs of real images and of fakes."""
        far = self.options.balance
        if not far:
            return True, True
        costs = self.run.mean(costs)
        wins, loses = bool((costs < EQUILIBRIUM - far).any()), bool((costs > EQUILIBRIUM + far).any())
        return (not wins, not loses) if wins != loses else (True, True)

    def moves(self) -> Iterator[tuple[str, Loss]]:
        options, decoder = self.options, self.networks["decoder"]
        images, *_ = self.run.batch()
        if options.vae:
            latents, prior = self.encode(images)
            yield "v", prior + squares(images - decoder(latents)) / options.pixel_std**2
            return
        features, head = self.networks["features"], self.networks["head"]

        def look(x: Tensor) -> Tensor:
            return head(features(x)).flatten()

        with torch.no_grad():
            latents, _ = self.encode(images)
            again, fresh = decoder(latents), decoder(self.run.normal(self.config.latent))
        of_real = F.softplus(-look(images)).mean()
        of_fakes = F.softplus(look(again)).mean() + F.softplus(look(fresh)).mean()
        discriminates, decodes = self.move_now(torch.stack([of_real, of_fakes / 2]).detach())
        if discriminates:
            yield "d", of_real + of_fakes

        with torch.no_grad():
            target = features(images)
        if decodes:
            seen, fresh = features(decoder(latents)), look(decoder(self.run.normal(self.config.latent)))
            adversarial = F.softplus(-head(seen)).mean() + F.softplus(-fresh).mean()
            yield "g", options.gamma * squares(seen - target) + adversarial

        latents, prior = self.encode(images)
        yield "e", prior + squares(features(decoder(latents)) - target)


def squares(difference: Tensor) -> Tensor:
    """Half the sum of squares of a sample, the mean over the samples."""
    return 0.5 * difference.square().flatten(1).sum(1).mean()
