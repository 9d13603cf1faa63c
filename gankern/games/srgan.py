"""SRGAN: an image from one of a quarter its size (Ledig 2016, arXiv 1609.04802).

First SRResNet is trained by the pixels' mean square error alone (``mse_steps``), then against a discriminator:

    L_D = E sp(-D(x)) + E sp(D(G(small x)))
    L_G = content(G(small x), x) + 1e-3 E sp(-D(G(small x)))

sp is the softplus. The paper's content is the distance of VGG19's features; without a download it is the pixels' mean
square error and the distance of the features of a fixed random network of three layers, by which edges are compared
too. Small images are bicubic (with antialiasing, a = -0.5, as MATLAB and Pillow have it) in [0, 1], results in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import losses, metrics
from gankern.data.drawn import _photographs
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run
from gankern.games._translation import detail
from gankern.models._record import Preset
from gankern.models.srgan import SCALE, discriminator, srresnet


def shrink(images: Tensor) -> Tensor:
    """Images of [-1, 1] at a quarter of their size, in [0, 1]."""
    size = [side // SCALE for side in images.shape[2:]]
    small = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    return (0.5 * small + 0.5).clamp(0.0, 1.0)


def enlarge(small: Tensor) -> Tensor:
    """Images of [0, 1] at four times their size, in [-1, 1], by the bicubic filter: what has to be beaten."""
    size = [side * SCALE for side in small.shape[2:]]
    return 2 * F.interpolate(small, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1) - 1


def decibels(images: Tensor, others: Tensor) -> float:
    """The mean PSNR of images in [-1, 1], of luma from 16 to 235 in 8 bits, without four pixels on each side."""
    return metrics.psnr(images, others, border=SCALE).mean().item()


class SRGAN(Game):
    """An image from one of a quarter its size."""

    family: ClassVar[str] = "image to image"
    data: ClassVar[str] = "photos"
    preset = Preset(
        loss="non_saturating", latent=1, width=16, lr=1e-3, beta1=0.9, batch_size=4, steps=2400, decay_steps=2400,
        checkpoint_every=600, evaluate=4,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options:
        blocks: int = 4  # 16 in the paper
        features: int = 64  # of the discriminator's linear layer; 1024 in the paper
        mse_steps: int = 1800  # by pixels alone, at first
        adversarial_weight: float = 1e-3
        content_weight: float = 1.0  # of the random network's features, beside the pixels

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, options = self.config, self.options
        self.refuse("latent", where="where images are made of images alone")
        if config.side % 16:
            raise ValueError(f"srgan: images of a size that can be halved four times, got {config.side}")
        critic_width = max(1, config.width // 2)
        self.networks = {
            "generator": srresnet(config.channels, config.width, options.blocks, run.layers),
            "discriminator": discriminator(config.side, config.channels, critic_width, options.features, run.layers),
        }
        self.players = {"d": Player(("discriminator",)), "g": Player(("generator",))}
        self.loss = losses.get(config.loss, config.real_target)
        self.step = -1
        # The same in every run, whatever its seed; it is no player's.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # of the CPU alone
            self.features = nn.Sequential(
                nn.Conv2d(config.channels, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(64, 64, 3, stride=2, padding=1),
            ).requires_grad_(False)
        self.features.to(run.device)

    def begin(self, step: int) -> bool:
        self.step = step
        return step == self.options.mse_steps  # another loss: Adam's averages of the first say nothing of it

    def work(self) -> Hashable:
        """Whether it is a step of the squared error alone."""
        return self.step < self.options.mse_steps

    def content(self, made: Tensor, images: Tensor) -> Tensor:
        loss = F.mse_loss(made, images)
        if self.options.content_weight:
            loss = loss + self.options.content_weight * F.mse_loss(self.features(made), self.features(images))
        return loss

    def moves(self) -> Iterator[tuple[str, Loss]]:
        options, critic = self.options, self.networks["discriminator"]
        images = self.run.batch()[0]
        made = self.networks["generator"](shrink(images))
        if self.step < options.mse_steps:
            yield "g", F.mse_loss(made, images)
            return
        yield "d", self.loss.discriminator(critic(images), critic(made.detach()))
        adversarial = self.loss.generator(critic(made))
        yield "g", self.content(made, images) + options.adversarial_weight * adversarial

    def upscale(self, small: Tensor) -> Tensor:
        """Images [N, C, H, W] in [0, 1] at four times their size, in [-1, 1], on the CPU."""
        like = next(self.networks["generator"].parameters())
        with self.evaluating():
            made = [self.networks["generator"](part.to(like)).cpu().clamp(-1, 1) for part in small.split(32)]
        return torch.cat(made)

    def held(self) -> list[Tensor]:
        """The right thirds of the photographs, which no crop is taken from, cut to multiples of four."""
        pictures = [picture[:, :, picture.shape[2] * 2 // 3 :] for picture in _photographs()]
        return [p[None, :, : p.shape[1] // 4 * 4, : p.shape[2] // 4 * 4] for p in pictures]

    def pictures(self) -> dict[str, Picture]:
        if self.config.channels != 3:
            return {}
        crops = torch.cat([p[:, :, top : top + 128, 40:168] for p in self.held() for top in (140, 270)])
        small = shrink(crops)
        nearest = 2 * F.interpolate(small, scale_factor=SCALE, mode="nearest") - 1
        rows = [nearest, enlarge(small), self.upscale(small), crops]
        return {"small, bicubic, made, real": Picture(torch.cat(rows), len(crops))}

    def figures(self) -> Figures:
        """``psnr_china``, ``psnr_flower``: dB on the held-out thirds of the photographs, each above what the bicubic
        filter has there; ``detail``: the energy of the finest Laplacian band, as a share of the real images'."""
        if self.config.channels != 3:
            return {}
        found, made_detail, real_detail = {}, 0.0, 0.0
        for name, picture in zip(("china", "flower"), self.held()):
            small = shrink(picture)
            made = self.upscale(small)
            found[f"psnr_{name}"] = decibels(made, picture)
            found[f"psnr_{name}_over_bicubic"] = found[f"psnr_{name}"] - decibels(enlarge(small), picture)
            even = [side // 2 * 2 for side in picture.shape[2:]]
            made_detail += float(detail(made[:, :, : even[0], : even[1]]))
            real_detail += float(detail(picture[:, :, : even[0], : even[1]]))
        return found | {"detail": made_detail / real_detail}
