"""Codes of texts, by a recurrent network over characters that is trained first and then left alone (Reed 2016b,
arXiv 1605.05395): structured joint embedding of texts and images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS = 32  # room for more than the letters and the space


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
