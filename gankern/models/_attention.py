"""The generator of SAGAN, BigGAN and BigGAN-deep: blocks with a condition each, and attention before one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from gankern.models.layers import Layers


class Generator(nn.Module):
    """(latents [N, latent], classes [N]) → images [N, channels, size, size] in [-1, 1].

    ``widths`` are those of the maps before, between and after the blocks, which ``block`` makes of their number and the
    two widths; ``inputs`` is the length of what the first layer takes, ``embedding`` that of a class's vector, if any.
    """

    def __init__(
        self, widths: Sequence[int], block: Callable[[int, int, int], nn.Module], attention: int, channels: int,
        inputs: int, num_classes: int, table: Layers, embedding: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        if embedding:
            self.embed = nn.Embedding(num_classes, embedding)
        self.first = table.linear(inputs, 16 * widths[0])
        self.blocks = nn.ModuleList(block(i, before, after) for i, (before, after) in enumerate(pairwise(widths)))
        self.attention_at, self.attention = attention, table.self_attention(widths[attention])
        self.norm = table.batch_norm_act(widths[-1])
        self.last = table.conv(widths[-1], channels, 3, padding=1)

    def images(self, first: Tensor, conditions: Iterable[Tensor]) -> Tensor:
        """Of what the first layer takes and each block's condition."""
        x = self.first(first).unflatten(1, (-1, 4, 4))
        for i, (block, condition) in enumerate(zip(self.blocks, conditions, strict=True)):
            x = block(self.attention(x) if i == self.attention_at else x, condition)
        return self.last(self.norm(x)).tanh()
