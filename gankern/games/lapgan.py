"""LAPGAN: a Laplacian pyramid of GANs, each of which adds what one level lacks (Denton 2015, arXiv 1506.05751).

Of an image's pyramid I_0, I_1, ... (each half the size of the one before), l_k = up(I_{k+1}) is the coarse image of
level k and h_k = I_k - l_k its residual. There is one GAN a level, trained on its own:

    G_k(z_k, l_k) -> h~_k,    D_k sees l_k + h_k, or l_k + h~_k, with one and the same l_k

and the last, coarsest one is a GAN of small images. Sampling goes up: I~_k = up(I~_{k+1}) + G_k(z_k, up(I~_{k+1})).
In training l_k is always of real images. A residual reaches from -2 to 2: no tanh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankern.functional as GF
from gankern import losses, models
from gankern.functional import filters
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run, Samples
from gankern.games._measures import band_figures
from gankern.games._networks import WithClass
from gankern.games._pictures import alternating
from gankern.models._record import Preset
from gankern.models.layers import Layers

COARSEST = 8


def level_generator(channels: int, size: int, width: int, classes: int, layers: Layers) -> WithClass:
    """A plane of noise, the coarse image (and a plane of the class) -> a residual."""
    inputs = 1 + channels + (classes > 0)
    network = nn.Sequential(
        layers.conv(inputs, width, 7, padding=3), layers.relu(inplace=True),
        layers.conv(width, width, 7, padding=3), layers.relu(inplace=True),
        layers.conv(width, channels, 5, padding=2),
    )  # fmt: skip
    return WithClass(network, size, classes, layers)


def level_discriminator(channels: int, size: int, width: int, classes: int, layers: Layers) -> WithClass:
    """A coarse image plus a residual (and a plane of the class) -> logits [N]."""
    last = (size - 4 - 5) // 2 + 1
    network = nn.Sequential(
        layers.conv(channels + (classes > 0), width, 5), layers.relu(inplace=True),
        layers.conv(width, width, 5, 2), layers.relu(inplace=True),
        nn.Dropout(0.5), nn.Flatten(), layers.linear(width * last**2, 1), nn.Flatten(0),
    )  # fmt: skip
    return WithClass(network, size, classes, layers)


class LAPGAN(Game):
    """A GAN for each level of a pyramid."""

    family: ClassVar[str] = "large images"
    data: ClassVar[str] = "shapes"
    takes: ClassVar[frozenset[str]] = frozenset({"conditioning", "evaluate_samples"})
    preset = Preset(
        loss="non_saturating", size=32, latent=64, width=16, batch_size=32, lr=5e-4, steps=1500, checkpoint_every=250,
        evaluate=6, evaluate_samples=1000,
    )  # fmt: skip
    same_work = True

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, layers = self.config, run.layers
        if config.side < 2 * COARSEST or config.side & (config.side - 1):
            raise ValueError(f"lapgan: images of a power of two from {2 * COARSEST} on, got {config.side}")
        if config.conditioning not in (None, "concatenation"):
            raise ValueError(f"lapgan: conditioning must be concatenation, or left out, got {config.conditioning}")
        self.classes = config.num_classes if config.conditioning else 0
        self.sizes = [config.side >> k for k in range((config.side // COARSEST).bit_length())]  # of the levels
        coarsest = models.gan(COARSEST, config.channels, config.latent, 40 * config.width, run.side,
                              num_classes=self.classes)  # fmt: skip
        self.networks, self.players = {}, {}
        for size in self.sizes:
            generate, judge = f"generator_{size}", f"discriminator_{size}"
            if size == COARSEST:
                self.networks |= {generate: coarsest.generator, judge: coarsest.discriminator}
            else:
                shape = (config.channels, size, config.width, self.classes, layers)
                self.networks |= {generate: level_generator(*shape), judge: level_discriminator(*shape)}
            self.players |= {f"d{size}": Player((judge,)), f"g{size}": Player((generate,))}
        self.loss = losses.get(config.loss, config.real_target)
        how, taps = "reference" if run.side == "torch" else None, filters.fir("1331").to(run.device)
        self.down = lambda x: GF.downsample2d(x, taps.to(x), 2, implementation=how)
        self.up = lambda x: GF.upsample2d(x, taps.to(x), 2, implementation=how)  # the transpose of down, times 4

    def moves(self) -> Iterator[tuple[str, Loss]]:
        image: Any
        image, *labels = self.run.batch()
        for size in self.sizes:
            judge = self.networks[f"discriminator_{size}"]
            smaller = self.down(image) if size > COARSEST else None
            make = partial(self.make, size, None if smaller is None else self.up(smaller), *labels)
            with torch.no_grad():
                fake = make()
            yield f"d{size}", self.loss.discriminator(judge(image, *labels), judge(fake, *labels))
            yield f"g{size}", self.loss.generator(judge(make(), *labels))
            image = smaller

    def make(self, size: int, coarse: Tensor | None, *labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """G(z) on the coarsest level, l + G(z, l) above it."""
        generate = self.networks[f"generator_{size}"]
        if noise is None:
            noise = self.run.normal(self.config.latent) if coarse is None else self.run.uniform(1, size, size, low=-1.0)
        if coarse is None:
            return generate(noise, *labels)
        return coarse + generate(torch.cat([noise.to(coarse), coarse], 1), *labels)

    def sample(self, number: int, seed: int = 0, labels: Tensor | None = None) -> list[Tensor]:
        """Images of all levels, the coarsest first, of one draw, on the CPU."""
        random, device = torch.Generator().manual_seed(seed), self.run.device
        if self.classes and labels is None:
            labels = torch.arange(number) % self.classes
        told = [] if labels is None else [labels.to(device)]
        with self.evaluating():
            latents = torch.randn(number, self.config.latent, generator=random).to(device)
            levels = [self.make(COARSEST, None, *told, noise=latents)]
            for size in self.sizes[-2::-1]:
                noise = 2 * torch.rand(number, 1, size, size, generator=random) - 1
                levels.append(self.make(size, self.up(levels[-1]), *told, noise=noise))
        return [level.cpu() for level in levels]

    def draw_classes(self, label: int | None, seed: int) -> Picture:
        if not self.classes:
            raise ValueError("lapgan has classes to draw a grid of only where it was trained with labels")
        asked = torch.arange(8 * self.classes) % self.classes if label is None else torch.full((64,), label)
        return Picture(self.sample(len(asked), seed, asked)[-1], self.classes if label is None else 8)

    def pictures(self) -> dict[str, Picture]:
        """Each sample on its way up: a level a row, blurred first and then clear."""
        levels, side = self.sample(16, self.config.seed), self.config.side
        rows = alternating(*(F.interpolate(level, size=(side, side)) for level in levels))
        return {f"from {COARSEST}x{COARSEST} up, a level a row": Picture(rows)}

    @classmethod
    def evaluator(cls, config: Any, samples: Samples, condition: Any = None) -> Callable[[Any], Figures]:
        """``swd_SIZE`` of each band of the pyramid: sliced Wasserstein distance x 1000 of samples to real images; and
        ``swd_SIZE_single``, of the coarsest GAN's images at full size, interpolated."""
        return band_figures(config, samples)
