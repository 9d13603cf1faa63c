"""BigGAN: a part of the latent to every block (Brock 2018, arXiv 1809.11096), on labels.

The hinge, judged by projection; the discriminator learns four times as fast as the generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gankern.games._classes import OfClasses
from gankern.models._record import Preset
from gankern.models.biggan import biggan
from gankern.models.gan import GAN


class BigGAN(OfClasses):
    preset: ClassVar[Preset] = Preset(
        loss="hinge", conditioning="projection", size=32, latent=32, width=16, batch_size=16, lr=1e-4, beta1=0.0,
        beta2=0.999, steps=700, checkpoint_every=350, ema=0.999,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options(OfClasses.Options):
        embedding: int = 32  # of a class; the paper's is 128

    def make(self, **options: Any) -> GAN:
        return biggan(**options, embedding=self.options.embedding)
