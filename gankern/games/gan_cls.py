"""GAN-CLS and GAN-INT: images of what a text says (Reed 2016, arXiv 1605.05396).

h = phi(t) is the code of a text that belongs to the image x, h~ that of a mismatched one, x^ = G(z, h). With
s_r = D(x, h), s_w = D(x, h~) and s_f = D(x^, h) the discriminator maximises

    log s_r + 1/2 [log(1 - s_w) + log(1 - s_f)]        (CLS: it must also tell wrong texts)

and the generator log s_f, and the same for codes between two texts of the batch, 1/2 h1 + 1/2 h2 (INT), of which there
are no images. phi is trained before the first step and then left alone (_text.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.data import drawn
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run, Samples
from gankern.games._scenes import scene_figures
from gankern.games._text import TextEncoder, embed_jointly
from gankern.models._record import Preset
from gankern.models.dcgan import initialise
from gankern.models.layers import Layers

TEXTS = (
    "a small red disc", "a large blue ring", "a large green cross", "a small yellow square",
    "a red square left of a blue disc", "a green ring above a yellow cross", "a large magenta triangle",
    "a large cyan disc",
)  # fmt: skip


class Residual(nn.Module):
    """ReLU(x + [1x1, 3x3, 3x3](x)), by a quarter of the channels."""

    def __init__(self, channels: int, layers: Layers, slope: float):
        super().__init__()
        few = channels // 4
        self.main = nn.Sequential(
            layers.conv(channels, few, 1), layers.batch_norm_act(few, slope),
            layers.conv(few, few, 3, padding=1), layers.batch_norm_act(few, slope),
            layers.conv(few, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.activation = layers.leaky_relu(slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.main(x))


class Generator(nn.Module):
    """z [N, latent] and the code of a text -> images, by transposed 4x4 convolutions from 4x4 on."""

    def __init__(self, size: int, channels: int, latent: int, code: int, projected: int, width: int, paper: bool,
                 layers: Layers):  # fmt: skip
        super().__init__()
        self.text = nn.Sequential(layers.linear(code, projected), layers.leaky_relu(0.2))
        maps = [width << i for i in reversed(range(size.bit_length() - 3))]
        modules: list[nn.Module] = [nn.Unflatten(1, (latent + projected, 1, 1))]
        for i, (before, after) in enumerate(pairwise([latent + projected, *maps, channels])):
            modules.append(layers.conv_transpose(before, after, 4, 2 if i else 1, 1 if i else 0, bias=paper))
            modules.append(layers.batch_norm_act(after) if i < len(maps) else nn.Tanh())
            if paper and i < 2:
                modules.append(Residual(after, layers, 0.0))
        self.main = nn.Sequential(*modules)

    def forward(self, latents: Tensor, codes: Tensor) -> Tensor:
        return self.main(torch.cat([latents, self.text(codes)], 1))


class Discriminator(nn.Module):
    """Images and codes of texts -> logits [N]; the code joins the map of 4x4."""

    def __init__(self, size: int, channels: int, code: int, projected: int, width: int, paper: bool, layers: Layers):
        super().__init__()
        maps = [width << i for i in range(size.bit_length() - 3)]
        modules: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise([channels, *maps])):
            modules.append(layers.conv(before, after, 4, 2, 1, bias=paper))
            modules.append(layers.batch_norm_act(after, 0.2) if i else layers.leaky_relu(0.2))
        last = maps[-1]
        self.image = nn.Sequential(*modules, *([Residual(last, layers, 0.2)] if paper else []))
        norm = layers.batch_norm_act_1d(projected, 0.2) if paper else layers.leaky_relu(0.2)
        self.text = nn.Sequential(layers.linear(code, projected), norm)
        self.both = nn.Sequential(
            layers.conv(last + projected, last, 1, bias=paper),
            layers.batch_norm_act(last, 0.2),
            layers.conv(last, 1, 4, bias=paper),
            nn.Flatten(0),
        )

    def forward(self, images: Tensor, codes: Tensor) -> Tensor:
        tiled = self.text(codes)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.both(torch.cat([self.image(images), tiled], 1))


class GANCLS(Game):
    """Images of texts."""

    family: ClassVar[str] = "text to image"
    needs: ClassVar[str | None] = "captions"
    data: ClassVar[str] = "captions"
    preset = Preset(
        loss="non_saturating", size=32, latent=64, width=32, lr=5e-4, batch_size=32, steps=2000, checkpoint_every=500
    )

    @dataclass(frozen=True)
    class Options:
        mismatched: float = 1.0  # weight of the term of mismatched texts; 0 is without CLS
        interpolated: float = 1.0  # weight of the term of codes between two texts; 0 is without INT
        encoder_steps: int = 400  # of the text encoder, before the first step
        paper: bool = False  # the authors' networks: residual blocks, biases, codes of 1024, projected to 128

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, paper = self.config, self.options.paper
        if config.side < 16 or config.side & (config.side - 1):
            raise ValueError(f"gan_cls: images of a power of two from 16 on, got {config.side}")
        code, projected = (1024, 128) if paper else (128, 64)
        shape = (config.side, config.channels)
        self.networks = {
            "encoder": TextEncoder(code),  # no player's
            # The authors' discriminator has half the generator's width.
            "generator": Generator(*shape, config.latent, code, projected, config.width, paper, run.layers),
            "discriminator": Discriminator(*shape, code, projected, config.width // (1 + paper), paper, run.layers),
        }
        for network in list(self.networks.values())[1:]:
            network.apply(initialise)
        self.players = {"d": Player(("discriminator",), "discriminator"), "g": Player(("generator",), "generator")}
        self.step = 0

    def begin(self, step: int) -> bool:
        self.step = step
        return False

    def moves(self) -> Iterator[tuple[str, Loss]]:
        options, run, latent = self.options, self.run, self.config.latent
        encoder, generate, judge = self.networks.values()
        if self.step == 0:
            # Every process sees whole batches here, so that all have one encoder.
            look = Discriminator(self.config.side, self.config.channels, 1, 1, 32, False, run.layers).image
            sizes = options.encoder_steps, self.config.batch_size
            embed_jointly(encoder, look.to(run.device), run.images, run.condition, *sizes)
        images, several = run.batch()
        texts = several[torch.arange(len(several)), run.classes(several.shape[1])]
        with torch.no_grad():
            codes = encoder(texts)
            fake = generate(run.normal(latent), codes)
        loss = F.softplus(-judge(images, codes)).mean() + 0.5 * F.softplus(judge(fake, codes)).mean()
        if options.mismatched:
            wrong = F.softplus(judge(images, codes.roll(1, 0)))
            differs = (several != several.roll(1, 0)).flatten(1).any(1)
            loss = loss + 0.5 * options.mismatched * (wrong * differs).sum() / differs.sum().clamp(min=1)
        yield "d", loss

        loss = F.softplus(-judge(generate(run.normal(latent), codes), codes)).mean()
        if options.interpolated:
            half = len(codes) // 2
            between = 0.5 * codes[:half] + 0.5 * codes[half : 2 * half]
            logits = judge(generate(run.normal(latent)[:half], between), between)
            loss = loss + options.interpolated * F.softplus(-logits).mean()
        yield "g", loss

    def sample(self, texts: Tensor, latents: Tensor | None = None, seed: int = 0) -> Tensor:
        """Images of texts [N, L], or of codes [N, D], on the CPU."""
        if latents is None:
            latents = torch.randn(len(texts), self.config.latent, generator=torch.Generator().manual_seed(seed))
        with self.evaluating():
            parts = []
            for text, z in zip(texts.to(self.run.device).split(256), latents.to(self.run.device).split(256)):
                codes = text if text.is_floating_point() else self.networks["encoder"](text)
                parts.append(self.networks["generator"](z.to(codes.dtype), codes).cpu())
        return torch.cat(parts)

    def draw_captions(self, texts: Sequence[str], seed: int) -> Picture:
        """A text a row, a latent a column."""
        spelt = torch.stack([drawn.spell(text) for text in texts])
        latents = torch.randn(8, self.config.latent, generator=torch.Generator().manual_seed(seed))
        images = self.sample(spelt.repeat_interleave(8, 0), latents.repeat(len(texts), 1))
        return Picture(images, rows=tuple(texts))

    def pictures(self) -> dict[str, Picture]:
        """A text a row, a latent a column; and from one text to another."""
        texts = torch.stack([drawn.spell(text) for text in TEXTS]).to(self.run.device)
        latents = torch.randn(1, self.config.latent, generator=torch.Generator().manual_seed(self.config.seed))
        with self.evaluating():
            codes = self.networks["encoder"](texts)
        way = torch.linspace(0, 1, 8, dtype=codes.dtype, device=codes.device)[:, None]
        between = torch.cat([torch.lerp(a, b, way) for a, b in zip(codes, codes.roll(-1, 0))])
        return {
            "a text a row, a latent a column": self.draw_captions(TEXTS, self.config.seed),
            "from each text to the next": Picture(self.sample(between, latents.expand(64, -1))),
        }

    @classmethod
    def evaluator(cls, config: Any, samples: Samples, condition: Any = None) -> Callable[[Any], Figures]:
        """Of scenes: whether a classifier reads the ``shape`` and the ``relation`` that new captions ask for, and the
        ``unseen_shape`` of combinations of colour and kind that are in no training image."""
        if not isinstance(samples, drawn.Scenes):
            return lambda game: {}
        return scene_figures(config.side, samples, config.evaluate_samples)
