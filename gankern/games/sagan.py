"""SAGAN: self-attention in both networks (Zhang 2018, arXiv 1805.08318), on labels.

The hinge, judged by projection; the discriminator learns four times as fast as the generator.
"""

from __future__ import annotations

from typing import Any, ClassVar

from gankern.games._classes import OfClasses
from gankern.models._record import Preset
from gankern.models.gan import GAN
from gankern.models.sagan import sagan


class SAGAN(OfClasses):
    preset: ClassVar[Preset] = Preset(
        loss="hinge", conditioning="projection", size=32, latent=128, width=16, batch_size=16, lr=1e-4, beta1=0.0,
        beta2=0.9, steps=1000, checkpoint_every=500,
    )  # fmt: skip

    def make(self, **options: Any) -> GAN:
        return sagan(**options)
