"""BigGAN-deep: BigGAN's game with bottleneck blocks, twice as many (Brock 2018, arXiv 1809.11096)."""

from __future__ import annotations

from typing import Any

from gankern.games.biggan import BigGAN
from gankern.models.biggan_deep import biggan_deep
from gankern.models.gan import GAN


class BigGANDeep(BigGAN):
    def make(self, **options: Any) -> GAN:
        return biggan_deep(**options, embedding=self.options.embedding)
