"""InfoGAN: codes of the generator's that its pictures tell, found without labels (Chen 2016, arXiv 1606.03657).

The latent vector has noise z and codes c: one of K classes, and numbers from [-1, 1]. The generator must make pictures
that c can be read from: a bound of their mutual information,

    L_I = E_{c, x = G(z, c)} log Q(c | x) + H(c)  <=  I(c; G(z, c)),

is maximised. Q shares the discriminator's trunk. As in the authors' code L_I enters both losses, so the trunk learns
it too:

    L_D = cross entropy - weight L_I        (trunk, head and Q)
    L_G = -E log D(G(z, c)) - weight L_I    (the generator)

log Q is the cross entropy for the class, and -1/2 (c - mu(x))^2 for a number (a Gaussian of variance 1, less its
constant).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import losses
from gankern.games._codes import OfCodes
from gankern.games._game import Loss, Player, Run
from gankern.games._networks import fully_connected, small_generator
from gankern.models._record import Preset
from gankern.models.layers import Layers


def small_networks(channels: int, size: int, latent: int, width: int, layers: Layers) -> dict[str, nn.Module]:
    """For images of 8x8: everything fully connected. Q, of one ``width``, is without its last layer."""
    pixels, hidden = channels * size * size, 2 * width
    return {
        "generator": small_generator(latent, channels, size, hidden, layers),
        "trunk": nn.Sequential(nn.Flatten(), *fully_connected((pixels, hidden, hidden), layers, 0.2, norm=False)),
        "head": layers.linear(hidden, 1),
        "q": nn.Sequential(*fully_connected((hidden, width), layers, 0.2, norm=False)),
    }


def paper_networks(channels: int, size: int, latent: int, width: int, layers: Layers) -> dict[str, nn.Module]:
    """The paper's network for MNIST, at ``width`` 64; sizes that can be halved twice. Q is without its last layer."""
    quarter, slope = size // 4, 0.1  # the paper's slope; its code has 0.01
    return {
        "generator": nn.Sequential(
            *fully_connected((latent, 16 * width, 2 * width * quarter**2), layers, 0.0, norm=True),
            nn.Unflatten(1, (2 * width, quarter, quarter)),
            layers.conv_transpose(2 * width, width, 4, 2, 1),
            layers.batch_norm_act(width),
            layers.conv_transpose(width, channels, 4, 2, 1),
            nn.Tanh(),  # the paper's sigmoid, for images in [-1, 1]
        ),
        "trunk": nn.Sequential(
            layers.conv(channels, width, 4, 2, 1),
            layers.leaky_relu(slope, inplace=True),
            layers.conv(width, 2 * width, 4, 2, 1),
            layers.batch_norm_act(2 * width, slope),
            nn.Flatten(),
            *fully_connected((2 * width * quarter**2, 16 * width), layers, slope, norm=True),
        ),
        "head": layers.linear(16 * width, 1),
        "q": nn.Sequential(*fully_connected((16 * width, 2 * width), layers, slope, norm=True)),
    }


class InfoGAN(OfCodes):
    """Codes that the pictures tell."""

    preset = Preset(loss="non_saturating", latent=16, width=64, lr=2e-4, steps=4000, checkpoint_every=500, evaluate=8)
    same_work = True

    @dataclass(frozen=True)
    class Options:
        code_weight: float = 1.0  # of L_I; 0 is a GAN
        classes: int = 10  # of the categorical code
        numbers: int = 2  # continuous codes
        g_lr: float = 1e-3

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, options = self.config, self.options
        if config.side < 8 or config.side % 4:
            raise ValueError(f"infogan: images of a size that can be halved twice, from 8 on; got {config.side}")
        codes = options.classes + options.numbers
        make = small_networks if config.side == 8 else paper_networks
        networks = make(config.channels, config.side, config.latent + codes, config.width, run.layers)
        q = networks["q"]
        assert isinstance(q, nn.Sequential)
        before = next(m for m in reversed(list(q.modules())) if hasattr(m, "out_features")).out_features
        q.append(run.layers.linear(before, codes))
        self.networks = networks
        self.players = {
            "d": Player(("trunk", "head", "q"), "discriminator"),
            "g": Player(("generator",), "generator", lr=options.g_lr),
        }
        self.loss = losses.get(config.loss, config.real_target)

    def codes(self) -> tuple[Tensor, Tensor]:
        """The codes of a batch: classes [N], and numbers [N, numbers] from U(-1, 1)."""
        return self.run.classes(self.options.classes), self.run.uniform(self.options.numbers, low=-1.0)

    def generate(self, noise: Tensor, classes: Tensor, numbers: Tensor) -> Tensor:
        one_hot = F.one_hot(classes, self.options.classes).to(noise.dtype)
        return self.networks["generator"](torch.cat([noise, one_hot, numbers], 1))

    def information(self, features: Tensor, classes: Tensor, numbers: Tensor) -> Tensor:
        """The bound L_I, less the constants of the continuous codes."""
        logits, means = self.networks["q"](features).split([self.options.classes, self.options.numbers], 1)
        gaussian = 0.5 * (numbers - means).square().sum(1).mean()
        return log(self.options.classes) - F.cross_entropy(logits, classes) - gaussian

    def moves(self) -> Iterator[tuple[str, Loss]]:
        trunk, head = self.networks["trunk"], self.networks["head"]
        real, *_ = self.run.batch()
        for player in ("d", "g"):
            noise, codes = self.run.uniform(self.config.latent, low=-1.0), self.codes()
            fake = self.generate(noise, *codes)
            features = trunk(fake.detach() if player == "d" else fake)
            if player == "d":
                loss = self.loss.discriminator(head(trunk(real)).flatten(), head(features).flatten())
            else:
                loss = self.loss.generator(head(features).flatten())
            yield player, loss - self.options.code_weight * self.information(features, *codes)
