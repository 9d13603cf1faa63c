"""Codes of texts, by a recurrent network over characters that is trained first and then left alone (Reed 2016b,
arXiv 1605.05395): structured joint embedding of texts and images. And what is drawn and measured of games of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.data import drawn
from gankern.games._game import Figures, Game, Picture, Samples
from gankern.games._scenes import scene_figures
from gankern.nn.coupling import apart

TEXTS = (
    "a small red disc", "a large blue ring", "a large green cross", "a small yellow square",
    "a red square left of a blue disc", "a green ring above a yellow cross", "a large magenta triangle",
    "a large cyan disc",
)  # fmt: skip
SYMBOLS = 32  # room for more than the letters and the space


@apart
class TextEncoder(nn.Module):
    """Texts [N, L] of symbols -> codes [N, length]."""

    def __init__(self, length: int):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(SYMBOLS, 16), nn.GRU(16, length, batch_first=True)
        self.last = nn.Linear(length, length)
        self.length = length

    def forward(self, texts: Tensor) -> Tensor:
        return self.last(self.recurrent(self.embedding(texts))[0].mean(1))


def same_texts(texts: Tensor) -> Tensor:
    """Which of N sets of texts [N, K, L] are equal, [N, N]: such are no mismatch."""
    flat = texts.flatten(1)
    return (flat[:, None] == flat).all(2)


def embed_jointly(encoder: Any, look: nn.Module, images: Any, texts: Any, steps: int, batch_size: int) -> None:
    """Trains ``encoder`` and ``look`` (images -> [N, F]) so that F(x, t) = v(x) phi(t), v one linear layer on ``look``,
    is larger by 1 for a text of the image than for the texts of others, and than for other images:

        mean_n sum_{j != n} max(0, 1 - F(x_n, t_n) + F(x_n, t_j)) + max(0, 1 - F(x_n, t_n) + F(x_j, t_n))
    """
    device = next(encoder.parameters()).device
    length = look(images[:2].to(device)).flatten(1).shape[1]
    look = nn.Sequential(look, nn.Flatten(), nn.Linear(length, encoder.length)).to(device)
    optimiser = torch.optim.Adam([*encoder.parameters(), *look.parameters()], 2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,))
        several, picked = texts[chosen], torch.randint(texts.shape[1], (batch_size,))
        codes = encoder(several[torch.arange(batch_size), picked].to(device))
        fit = look(images[chosen].to(device)) @ codes.T
        own = fit.diagonal()
        worse = F.relu(1.0 - own[:, None] + fit) + F.relu(1.0 - own[None, :] + fit)
        loss = worse.masked_fill(same_texts(several).to(device), 0.0).sum() / batch_size
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def standardise(encoder: Any, texts: Any) -> None:
    """Gives each number of the codes of ``texts`` [N, K, L] (of a thousand of them) mean 0 and variance 1, as have the
    latents that they stand beside. The joint embedding sees differences of products alone, and leaves them a spread of
    some 0.03: a generator would not see the text for the latents."""
    some = torch.arange(0, len(texts), max(1, len(texts) // 1000))
    codes = encoder(texts[some][:, 0].to(encoder.last.weight.device))
    std, mean = torch.std_mean(codes, 0)
    encoder.last.weight /= std[:, None]
    encoder.last.bias.sub_(mean).div_(std)


class OfTexts(Game):
    """A game with the networks "encoder", texts -> codes, and "generator", latents and codes -> images."""

    family: ClassVar[str] = "text to image"
    needs: ClassVar[str | None] = "captions"
    data: ClassVar[str] = "captions"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluate_samples"})

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
