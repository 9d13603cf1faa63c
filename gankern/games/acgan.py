"""AC-GAN: a discriminator that also says which class it sees (Odena 2016, arXiv 1610.09585).

Two heads on one trunk, a source S (real or fake) and a class C:

    L_S = E log P(S = real | x) + E log P(S = fake | G(z, c))
    L_C = E log P(C = c | x) + E log P(C = c | G(z, c))

The discriminator maximises L_S + L_C, the generator L_C - L_S (non-saturating in S). Classes of fakes are drawn
uniformly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import losses, metrics
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run
from gankern.games._measures import read_classes
from gankern.games._networks import small_generator
from gankern.models._record import Preset
from gankern.models.dcgan import initialise
from gankern.models.layers import Layers


def small_networks(channels: int, size: int, latent: int, width: int, layers: Layers) -> dict[str, nn.Module]:
    """For images of 8x8: everything fully connected, with hidden layers of a third and two thirds of ``width``."""
    modules: list[nn.Module] = [nn.Flatten()]
    hidden = width // 3
    for inputs in (channels * size * size, 2 * hidden):
        modules += [layers.linear(inputs, 2 * hidden), layers.leaky_relu(0.2, inplace=True), nn.Dropout(0.5)]
    return {"generator": small_generator(latent, channels, size, hidden, layers), "trunk": nn.Sequential(*modules)}


def paper_networks(
    channels: int, size: int, latent: int, width: int, kernel: int, layers: Layers
) -> dict[str, nn.Module]:
    """The paper's for CIFAR-10 at ``width`` 384 and ``kernel`` 5; 4, the default, has no uneven overlap."""
    start, rest = size // 8, kernel % 2  # a kernel of 5 needs a row more of output
    generator: list[nn.Module] = [
        layers.linear(latent, width * start**2),
        layers.relu(inplace=True),
        nn.Unflatten(1, (width, start, start)),
    ]
    widths = (width, width // 2, width // 4, channels)
    for inputs, outputs in pairwise(widths):
        generator.append(layers.conv_transpose(inputs, outputs, kernel, 2, (kernel - 1) // 2, output_padding=rest))
        generator.append(layers.batch_norm_act(outputs))
    generator[-1] = nn.Tanh()
    trunk: list[nn.Module] = []
    for i, scale in enumerate((24, 12, 6, 3, 1.5, 0.75)):
        outputs, inputs = int(width / scale), channels if i == 0 else int(width / scale) // 2
        trunk.append(layers.conv(inputs, outputs, 3, 2 - i % 2, 1))
        trunk.append(layers.batch_norm_act(outputs, 0.2) if i else layers.leaky_relu(0.2, inplace=True))
        trunk.append(nn.Dropout(0.5))
    return {"generator": nn.Sequential(*generator), "trunk": nn.Sequential(*trunk, nn.Flatten())}


class ACGAN(Game):
    """Source and class."""

    family: ClassVar[str] = "codes and conditions"
    needs: ClassVar[str | None] = "labels"
    preset = Preset(loss="non_saturating", latent=16, width=384, lr=2e-4, steps=3000, checkpoint_every=500, evaluate=6)
    same_work = True

    @dataclass(frozen=True)
    class Options:
        kernel: int = 4  # of the generator's transposed convolutions; the paper's is 5

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, latent = self.config, self.config.latent + self.config.num_classes
        if config.side < 8 or config.side % 8:
            raise ValueError(f"acgan: images of a size that can be halved three times, got {config.side}")
        least = 3 if config.side == 8 else 24
        if config.width < least:
            raise ValueError(f"acgan: width must be at least {least} for images of {config.side}, got {config.width}")
        if self.options.kernel not in (4, 5):
            raise ValueError(f"acgan: option kernel must be 4 or 5, got {self.options.kernel}")
        if config.side == 8:
            self.refuse("kernel", where="at 8x8, where all layers are fully connected")
            self.networks = small_networks(config.channels, config.side, latent, config.width, run.layers)
            features = 2 * (config.width // 3)
        else:
            self.networks = paper_networks(
                config.channels, config.side, latent, config.width, self.options.kernel, run.layers
            )
            features = int(config.width / 0.75) * (config.side // 8) ** 2
        self.networks["heads"] = run.layers.linear(features, 1 + config.num_classes)
        if config.side > 8:
            for network in self.networks.values():
                network.apply(initialise)
        self.players = {
            "d": Player(("trunk", "heads"), "discriminator"),
            "g": Player(("generator",), "generator"),
        }
        self.loss = losses.get(config.loss, config.real_target)

    def generate(self, noise: Tensor, classes: Tensor) -> Tensor:
        one_hot = F.one_hot(classes, self.config.num_classes).to(noise.dtype)
        return self.networks["generator"](torch.cat([noise, one_hot], 1))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of the source [N], and the logits of the classes [N, K]."""
        heads = self.networks["heads"](self.networks["trunk"](images))
        return heads[:, 0], heads[:, 1:]

    def moves(self) -> Iterator[tuple[str, Loss]]:
        config = self.config
        real, labels = self.run.batch()
        noise, classes = self.run.normal(config.latent), self.run.classes(config.num_classes)
        with torch.no_grad():
            fake = self.generate(noise, classes)
        (source, named), (fake_source, fake_named) = self.look(real), self.look(fake)
        of_class = F.cross_entropy(named, labels) + F.cross_entropy(fake_named, classes)
        yield "d", self.loss.discriminator(source, fake_source) + of_class

        noise, classes = self.run.normal(config.latent), self.run.classes(config.num_classes)
        source, named = self.look(self.generate(noise, classes))
        yield "g", self.loss.generator(source) + F.cross_entropy(named, classes)

    def sample(self, classes: Tensor, seed: int = 0) -> Tensor:
        """Images of the classes [N], on the CPU."""
        noise = torch.randn(len(classes), self.config.latent, generator=torch.Generator().manual_seed(seed))
        with self.evaluating():
            return self.generate(noise.to(self.run.device), classes.to(self.run.device)).cpu()

    def draw_classes(self, label: int | None, seed: int) -> Picture:
        classes = self.config.num_classes
        asked = torch.arange(8 * classes) % classes if label is None else torch.full((64,), label)
        return Picture(self.sample(asked, seed), classes if label is None else 8)

    def pictures(self) -> dict[str, Picture]:
        return {"a class a column": self.draw_classes(None, self.config.seed)}

    def figures(self) -> Figures:
        """``label_accuracy``: how often a classifier of real images sees the class that was asked for; and
        ``diversity``: the standard deviation within a class, as a share of real images'; from 16 pixels on also
        ``similarity`` and ``similarity_real``, MS-SSIM of pairs within a class (Odena 2016, section 4.2)."""
        config, run = self.config, self.run
        asked = torch.arange(1000) % config.num_classes
        images = self.sample(asked, config.seed)
        some = run.spread(5000)
        real, labels = run.images[some].cpu(), run.labels[some].cpu()
        found = {
            "label_accuracy": metrics.label_accuracy(asked, read_classes(images, config.data, config.side)),
            "diversity": metrics.within_class_diversity(images, asked) / metrics.within_class_diversity(real, labels),
        }
        if config.side >= 16 and config.channels in (1, 3):
            found["similarity"] = metrics.within_class_similarity(images, asked)
            found["similarity_real"] = metrics.within_class_similarity(real, labels)
        return found
