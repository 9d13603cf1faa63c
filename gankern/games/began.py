"""BEGAN: two auto-encoding errors in a balance (Berthelot 2017, arXiv 1703.10717).

The discriminator is an auto-encoder, and v's error is L(v) = mean |v - D(v)|:

    L_D = L(x) - k L(G(z_D))
    L_G = L(G(z_G))
    k <- clip(k + lambda (gamma L(x) - L(G(z_G))), 0, 1),   k = 0 at first

gamma, the diversity, is the ratio of the two errors that k keeps. M = L(x) + |gamma L(x) - L(G(z_G))| falls as the
pictures become better. The decoder is built as the generator is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankern import metrics
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run
from gankern.games._pictures import alternating
from gankern.models._record import Preset
from gankern.models.layers import Layers


def encoder(channels: int, size: int, width: int, codes: int, layers: Layers) -> nn.Sequential:
    """[N, C, size, size] -> 3x3 convolutions with ELU, a ``width`` more at each level, halved down to 8x8 -> codes."""

    def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [layers.conv(inputs, outputs, 3, stride, 1, bias=False), layers.bias_act(outputs, "elu")]

    levels = levels_of(size)
    modules, maps = conv(channels, width), width
    for level in range(1, levels + 1):
        modules += conv(maps, level * width) + conv(level * width, level * width)
        maps = level * width
        if level < levels:
            modules += conv(maps, maps, stride=2)
    return nn.Sequential(*modules, nn.Flatten(), layers.linear(64 * maps, codes))


def generator(channels: int, size: int, width: int, codes: int, layers: Layers) -> nn.Sequential:
    """Codes -> [N, width, 8, 8] -> two 3x3 convolutions with ELU at each size up to ``size``; a linear one."""
    modules: list[nn.Module] = [layers.linear(codes, 64 * width), nn.Unflatten(1, (width, 8, 8))]
    for level in range(levels_of(size)):
        for first in (True, False):
            make = layers.upsample_conv if level and first else layers.conv
            padding = {} if make is layers.upsample_conv else {"padding": 1}
            modules += [make(width, width, 3, bias=False, **padding), layers.bias_act(width, "elu")]
    return nn.Sequential(*modules, layers.conv(width, channels, 3, padding=1))


def levels_of(size: int) -> int:
    levels = size.bit_length() - 3
    if levels < 1 or size != 4 << levels:
        raise ValueError(f"began: images of a size that is a power of two from 8 on, got {size}")
    return levels


class Balance(nn.Module):
    """k, and the measure of convergence."""

    k: Tensor
    convergence: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros((), device=device))
        self.register_buffer("convergence", torch.zeros((), device=device))


class BEGAN(Game):
    """Two errors in a balance."""

    carried: Balance
    same_work = True

    family: ClassVar[str] = "modes and stability"
    data: ClassVar[str] = "shapes"
    own_loss: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({"evaluate_samples"})
    preset = Preset(
        loss="non_saturating", size=32, latent=32, width=16, lr=1e-3, batch_size=16, steps=2000, checkpoint_every=500,
        evaluate=1,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options:
        diversity: float = 0.5  # gamma
        rate: float = 0.02  # lambda; the paper's is 1e-3, in a hundred times as many steps

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        sizes = config.channels, config.side, config.width, config.latent, run.layers
        self.networks = {"generator": generator(*sizes), "encoder": encoder(*sizes), "decoder": generator(*sizes)}
        for module in (m for network in self.networks.values() for m in network.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):  # gradients have ten layers without a norm to come through
                nn.init.xavier_uniform_(module.weight)
        self.players = {
            "d": Player(("encoder", "decoder"), "auto-encoder"),
            "g": Player(("generator",), "generator"),
        }
        self.carried = Balance(run.device)

    def error(self, images: Tensor) -> Tensor:
        """L: the mean absolute error of the reconstruction."""
        again = self.networks["decoder"](self.networks["encoder"](images))
        return (images - again).abs().mean()

    def moves(self) -> Iterator[tuple[str, Loss]]:
        options, latent = self.options, self.config.latent
        real, *_ = self.run.batch()
        with torch.no_grad():
            fake = self.networks["generator"](self.run.uniform(latent, low=-1.0))
        of_real = self.error(real)
        yield "d", of_real - self.carried.k * self.error(fake)

        of_fake = self.error(self.networks["generator"](self.run.uniform(latent, low=-1.0)))
        yield "g", of_fake

        k, convergence = self.carried.k, self.carried.convergence
        gap = self.run.mean((options.diversity * of_real - of_fake).detach().to(k.dtype))
        k.add_(options.rate * gap).clamp_(0.0, 1.0)
        of_now = self.run.mean(of_real.detach().to(k.dtype)) + gap.abs()
        convergence.copy_(torch.where(convergence == 0, of_now, torch.lerp(convergence, of_now, 0.05)))

    def extra_state(self) -> dict[str, Any]:
        return self.carried.state_dict()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.carried.load_state_dict(state)

    def drawn(self, number: int) -> Tensor:
        random = torch.Generator().manual_seed(self.config.seed)
        latents = 2 * torch.rand(number, self.config.latent, generator=random) - 1
        with self.evaluating():
            return torch.cat(
                [self.networks["generator"](z).cpu() for z in latents.to(self.run.device).split(250)]
            ).clamp(-1, 1)

    def pictures(self) -> dict[str, Picture]:
        drawn = {"samples": Picture(self.drawn(64))}
        if self.run.samples is not None:
            images = self.run.images[self.run.spread(32)].to(self.run.device)
            with self.evaluating():
                again = self.networks["decoder"](self.networks["encoder"](images))
            drawn["images and reconstructions"] = Picture(alternating(images, again))
        return drawn

    def figures(self) -> Figures:
        """``convergence``: M, a moving average over some twenty steps; ``k``; ``fid_own_classifier``: in
        features of a classifier of the data."""
        found = {"convergence": self.carried.convergence.item(), "k": self.carried.k.item()}
        if self.run.known_labels() is not None:
            number = min(self.config.evaluate_samples, len(self.run.images))
            extract = metrics.trained(self.config.data, self.config.side, seed=1)
            real, fake = (extract(x).features for x in (self.run.images[self.run.spread(number)], self.drawn(number)))
            found["fid_own_classifier"] = metrics.frechet_distance(real, fake)
        return found
