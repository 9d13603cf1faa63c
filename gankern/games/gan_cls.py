"""GAN-CLS and GAN-INT: images of what a text says (Reed 2016, arXiv 1605.05396).

h = phi(t) is the code of a text that belongs to the image x, h~ that of a mismatched one, x^ = G(z, h). With
s_r = D(x, h), s_w = D(x, h~) and s_f = D(x^, h) the discriminator maximises

    log s_r + 1/2 [log(1 - s_w) + log(1 - s_f)]        (CLS: it must also tell wrong texts)

and the generator log s_f, and the same for codes between two texts of the batch, 1/2 h1 + 1/2 h2 (INT), of which there
are no images. phi is trained before the first step and then left alone (_text.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from gankern.games._game import Loss, Player, Run
from gankern.games._text import OfTexts, TextEncoder, embed_jointly, standardise
from gankern.games._text_networks import AUTHORS, PLAIN, SMALL, Discriminator, Generator
from gankern.models._record import Preset
from gankern.models.dcgan import initialise
from gankern.models.layers import normalise_spectrally


class GANCLS(OfTexts):
    """Images of texts."""

    own_loss: ClassVar[bool] = True
    preset = Preset(
        loss="non_saturating", size=32, latent=64, width=32, lr=1e-3, beta1=0.0, beta2=0.99, batch_size=32, steps=2000,
        checkpoint_every=500,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options:
        mismatched: float = 1.0  # weight of the term of mismatched texts; 0 is without CLS
        mismatches: int = 1  # mismatched texts an image, of the batch
        captions: int = 1  # texts of an image whose codes' mean is its code; the authors' is 4
        interpolated: float = 1.0  # weight of the term of codes between two texts; 0 is without INT
        encoder_steps: int = 400  # of the text encoder, before the first step
        spectral: bool = True  # the small discriminator has spectral norm in the place of batch norm
        paper: bool = False  # the authors' networks: residual blocks, biases, codes of 1024, projected to 128
        blocks: bool = True  # of the paper's; without, they are the form that is widely used

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, options = self.config, self.options
        if options.paper:
            self.refuse("spectral", where="with paper, whose discriminator has batch norm")
        else:
            self.refuse("blocks", where="without paper")
        if options.captions < 1:
            raise ValueError(f"gan_cls: option captions must be at least 1, got {options.captions}")
        if not options.mismatched:
            self.refuse("mismatches", where="with mismatched 0")
        spectral = options.spectral and not options.paper
        form = SMALL if not options.paper else AUTHORS if options.blocks else PLAIN
        if config.side < 16 or config.side & (config.side - 1):
            raise ValueError(f"gan_cls: images of a power of two from 16 on, got {config.side}")
        least = 2 * run.share[1]
        if config.batch_size < least and (options.mismatched or options.interpolated):
            raise ValueError(
                f"gan_cls: a text is held against another sample's: batch_size must be at least {least}, got "
                f"{config.batch_size}"
            )
        shape = (config.side, config.channels)
        self.networks = {
            "encoder": TextEncoder(form.code),  # no player's
            "generator": Generator(*shape, config.latent, config.width, form, run.layers),
            "discriminator": Discriminator(*shape, config.width // form.ratio, form, run.layers, spectral),
        }
        for network in list(self.networks.values())[1:]:
            network.apply(initialise)
        if spectral:
            normalise_spectrally(self.networks["discriminator"], run.layers)
        self.players = {"d": Player(("discriminator",), "discriminator"), "g": Player(("generator",), "generator")}
        self.step = 0

    def begin(self, step: int) -> bool:
        self.step = step
        return False

    def work(self) -> Hashable:
        """Whether it is the first one, which trains the encoder."""
        return self.step == 0

    def moves(self) -> Iterator[tuple[str, Loss]]:
        options, run, latent = self.options, self.run, self.config.latent
        encoder, generate = self.networks["encoder"], self.networks["generator"]
        judge: Any = self.networks["discriminator"]
        if self.step == 0:
            # Every process sees whole batches here, so that all have one encoder.
            look = Discriminator(self.config.side, self.config.channels, 32, SMALL, run.layers).image
            sizes = options.encoder_steps, self.config.batch_size
            embed_jointly(encoder, look.to(run.device), run.images, run.condition, *sizes)
            standardise(encoder, run.condition)
        images, several = run.batch()
        known = several.shape[1]
        rows = torch.arange(len(several), device=several.device)[:, None]
        following = torch.arange(min(options.captions, known), device=several.device)
        texts = several[rows, (run.classes(known)[:, None] + following) % known]
        with torch.no_grad():
            codes = encoder(texts.flatten(0, 1)).unflatten(0, texts.shape[:2]).mean(1)
            fake = generate(run.normal(latent), codes)
        seen = judge.image(images)
        loss = F.softplus(-judge(images, codes, features=seen)).mean() + 0.5 * F.softplus(judge(fake, codes)).mean()
        if options.mismatched:  # several texts an image, the next ones of the batch: its features are there
            far = range(1, min(options.mismatches, len(codes) - 1) + 1)
            others = torch.cat([codes.roll(k, 0) for k in far])
            wrong = F.softplus(judge(images, others, features=seen.repeat(len(far), 1, 1, 1)))
            differs = torch.cat([(several != several.roll(k, 0)).flatten(1).any(1) for k in far])
            loss = loss + 0.5 * options.mismatched * (wrong * differs).sum() / differs.sum().clamp(min=1)
        yield "d", loss

        loss = F.softplus(-judge(generate(run.normal(latent), codes), codes)).mean()
        if options.interpolated:
            half = len(codes) // 2
            between = 0.5 * codes[:half] + 0.5 * codes[half : 2 * half]
            logits = judge(generate(run.normal(latent)[:half], between), between)
            loss = loss + options.interpolated * F.softplus(-logits).mean()
        yield "g", loss
