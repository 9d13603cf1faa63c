"""BiGAN and ALI: a generator and its inverse, by a discriminator of pairs (Donahue 2016, arXiv 1605.09782; Dumoulin
2016, arXiv 1606.00704).

    L_D   = E softplus(-D(x, E(x))) + E softplus(D(G(z), z))
    L_G,E = E softplus(D(x, E(x))) + E softplus(-D(G(z), z))

The encoder E sees no z of an image, and the generator G no image of a z; at the optimum they are each other's inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from gankern import losses
from gankern.games._ali import ali_networks
from gankern.games._encoders import Encodes
from gankern.games._game import Figures, Loss, Player, Run
from gankern.games._measures import read_classes
from gankern.games._networks import Noise
from gankern.models._record import Preset
from gankern.models.dcgan import initialise
from gankern.models.layers import Layers
from gankern.nn.coupling import apart


@apart
class OnPairs(nn.Module):
    """(x, z) -> logits [N]: what is made of an image beside what is made of a latent, and a network on both."""

    def __init__(self, image: nn.Module, latent: nn.Module, both: nn.Module):
        super().__init__()
        self.image, self.latent, self.both = image, latent, both

    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        return self.both(torch.cat([self.image(images), self.latent(latents)], 1)).flatten()


def bigan_networks(
    channels: int, size: int, latent: int, width: int, noise: Noise, layers: Layers
) -> dict[str, nn.Module]:
    """The paper's for MNIST at ``width`` 1024: two hidden layers each."""
    pixels = channels * size * size

    def hidden(sizes: tuple[int, ...], slope: float, norm: bool) -> list[nn.Module]:
        modules: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            modules.append(layers.linear(inputs, outputs, bias=not norm))
            modules.append(layers.batch_norm_act_1d(outputs, slope) if norm else layers.leaky_relu(slope, inplace=True))
        return modules

    return {
        "generator": nn.Sequential(
            *hidden((latent, width, width), 0.0, norm=True),
            layers.linear(width, pixels),
            nn.Tanh(),
            nn.Unflatten(1, (channels, size, size)),
        ),
        "encoder": nn.Sequential(
            nn.Flatten(), *hidden((pixels, width, width), 0.2, norm=True), layers.linear(width, latent)
        ),
        "discriminator": OnPairs(
            nn.Sequential(noise, nn.Flatten()),
            nn.Identity(),
            nn.Sequential(*hidden((pixels + latent, width, width), 0.2, norm=False), layers.linear(width, 1)),
        ),
    }


class BiGAN(Encodes):
    """A generator and its inverse."""

    same_work = True
    held_out: ClassVar[float] = 0.2
    preset = Preset(
        loss="non_saturating", latent=16, width=256, lr=2e-3, batch_size=128, steps=4000, decay_steps=4000,
        checkpoint_every=1000, evaluate=1,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options:
        ali: bool = False  # ALI's networks for 32x32, and an encoder that draws its latents
        noise: float = 1.0  # of images, to the discriminator, which else learns them by heart; the paper has none
        g_lr: float = 2e-4  # of generator and encoder, a tenth of the discriminator's: he has to be ahead to tell of z

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        if self.options.ali:
            self.refuse("noise", where="with ali, whose discriminator has dropout instead")
            if config.side != 32 or config.width % 16:
                raise ValueError(
                    f"bigan: ALI's networks are for 32x32 and a width that is a multiple of 16, got {config.side}x"
                    f"{config.side} and {config.width}"
                )
            generator, encoder, parts = ali_networks(config.channels, config.latent, config.width, run.layers)
            self.networks = {"generator": generator, "encoder": encoder, "discriminator": OnPairs(*parts)}
            for network in self.networks.values():
                network.apply(partial(initialise, std=0.01))
        else:
            sizes = (config.channels, config.side, config.latent, config.width)
            self.networks = bigan_networks(*sizes, Noise(self.options.noise, run.draw), run.layers)
        self.players = {
            "d": Player(("discriminator",), "discriminator"),
            "g": Player(("generator", "encoder"), "generator and encoder", lr=self.options.g_lr),
        }
        self.loss = losses.get(config.loss, config.real_target)

    def latents(self) -> Tensor:
        return self.run.normal(self.config.latent) if self.options.ali else self.run.uniform(self.config.latent, low=-1)

    def encode(self, images: Tensor) -> Tensor:
        """E(x): ALI's draws from N(mean, std^2) while it trains, and gives the mean in evaluation."""
        codes = self.networks["encoder"](images)
        if not self.options.ali:
            return codes
        mean, log_std = codes.chunk(2, 1)
        return mean + log_std.exp() * self.run.normal(self.config.latent) if self.networks["encoder"].training else mean

    def coding(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        return self.quietly(self.encode), self.quietly(self.networks["generator"])

    def moves(self) -> Iterator[tuple[str, Loss]]:
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        images, *_ = self.run.batch()
        latents = self.latents()
        with torch.no_grad():
            codes, fakes = self.encode(images), generator(latents)
        yield "d", self.loss.discriminator(discriminator(images, codes), discriminator(fakes, latents))

        latents = self.latents()
        inferred, made = discriminator(images, self.encode(images)), discriminator(generator(latents), latents)
        # Each pair is to be taken for the other: logits change signs, and least squares' targets, 1 and 0, places.
        exchanged = 1.0 - inferred if self.config.loss == "least_squares" else -inferred
        yield "g", self.loss.generator(exchanged) + self.loss.generator(made)

    def drawn(self, number: int) -> Tensor:
        if self.options.ali:
            return super().drawn(number)
        return 2 * torch.rand(number, self.config.latent, generator=torch.Generator().manual_seed(self.config.seed)) - 1

    def figures(self) -> Figures:
        """``r2``: of E(G(z)) for z, the mean over the coordinates; ``class_kept``: for how many of the held-out images
        a classifier of real images sees in G(E(x)) what it sees in x; ``reconstruction``: their mean square error."""
        latents, images, (encode, decode) = self.drawn(1000), self.seen(1000), self.coding()
        inverse, again = encode(decode(latents)), decode(encode(images))
        residual, spread = (inverse - latents).square().mean(0), latents.var(0, correction=0)
        error = (again - images).square().mean()
        found = {"r2": (1 - residual / spread).mean().item(), "reconstruction": error.item()}
        if self.run.known_labels() is not None:
            before, after = (read_classes(x, self.config.data, self.config.side) for x in (images, again))
            found["class_kept"] = (before == after).float().mean().item()
        return found
