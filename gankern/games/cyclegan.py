"""CycleGAN: two domains translated into each other, without pairs (Zhu 2017, arXiv 1703.10593).

G: A -> B and F: B -> A, a discriminator of patches for each domain:

    L_G = E (D_B(G(a)) - 1)^2 + E (D_A(F(b)) - 1)^2 + cycle (|F(G(a)) - a| + |G(F(b)) - b|)
          + identity cycle (|G(b) - b| + |F(a) - a|)
    L_D = 1/2 [E (D(real) - 1)^2 + E D(fake)^2]        for each domain

``loss`` "non_saturating" has the cross entropy in place of the squares. The discriminators are given fakes of a pool:
once 50 are kept, each new one is, with probability one half, put into the pool for an old one, which is given instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankern import losses
from gankern.core.names import look_up
from gankern.data.batches import part_of
from gankern.data.drawn import plain
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run
from gankern.games._pool import ImagePool
from gankern.games._translation import hidden_pairs, stripe_figures
from gankern.models._record import Preset
from gankern.models.cyclegan import translator
from gankern.models.pix2pix import patchgan

HELD_OUT = 200

# How many times a loss counts, the discriminators' and the translators': least squares, which have their half already,
# are without it in the translators' loss.
WEIGHTS = {"least_squares": (1.0, 2.0), "non_saturating": (0.5, 1.0)}


class CycleGAN(Game):
    """Two domains, without pairs."""

    carried: nn.ModuleDict
    same_work = True

    family: ClassVar[str] = "image to image"
    needs: ClassVar[str | None] = "unpaired"
    data: ClassVar[str] = "plain"
    preset = Preset(
        loss="least_squares", latent=1, width=16, lr=1e-3, batch_size=4, steps=2200, decay_steps=2200,
        checkpoint_every=400, evaluate=4,
    )  # fmt: skip

    @dataclass(frozen=True)
    class Options:
        cycle: float = 10.0
        identity: float = 0.5  # as a share of ``cycle``: where colours are to stay, as here; 0 for other pairs
        blocks: int = 3  # of the translators; 9 at 256 pixels, 6 at 128
        strided: int = 2  # convolutions of stride 2 of the discriminators; 3 are PatchGAN 70
        pool: int = 50  # fakes that are kept
        upsample: str = "transposed"  # or "nearest", without the uneven overlap

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, options = self.config, self.options
        self.refuse("latent", where="where images are made of images alone")
        if not options.cycle:
            self.refuse("identity", where="with cycle 0, of which it is a share")
        if config.side % 4 or config.side < 16:
            raise ValueError(f"cyclegan: images of a size that can be halved twice, from 16 on; got {config.side}")
        if run.condition is not None and tuple(run.condition.shape[1:]) != tuple(run.images.shape[1:]):
            raise ValueError(
                f"cyclegan: images of the two domains must be of one shape, got {tuple(run.images.shape[1:])} and "
                f"{tuple(run.condition.shape[1:])}"
            )

        def generator() -> nn.Module:
            return translator(config.channels, config.width, options.blocks, options.upsample, run.layers)

        def discriminator() -> nn.Module:
            return patchgan(config.channels, config.width, options.strided, "instance", run.layers)

        self.networks = {"a_to_b": generator(), "b_to_a": generator(), "d_a": discriminator(), "d_b": discriminator()}
        self.players = {
            "g": Player(("a_to_b", "b_to_a"), "translators"),
            "d": Player(("d_a", "d_b"), "discriminators"),
        }
        self.weights = look_up(WEIGHTS, config.loss, "loss of cyclegan")
        self.loss = losses.get(config.loss, config.real_target)
        like = torch.empty(config.batch_size, config.channels, config.side, config.side, device=run.device)
        like = like[part_of(len(like), run.share)]
        self.carried = nn.ModuleDict({"a": ImagePool(options.pool, like), "b": ImagePool(options.pool, like)})

    def moves(self) -> Iterator[tuple[str, Loss]]:
        options, networks = self.options, self.networks
        a, b = self.run.batch()
        fake_b, fake_a = networks["a_to_b"](a), networks["b_to_a"](b)
        of_discriminator, of_generator = self.weights
        loss = self.loss.generator(networks["d_b"](fake_b)) + self.loss.generator(networks["d_a"](fake_a))
        loss = of_generator * loss
        if options.cycle:
            again = (networks["b_to_a"](fake_b) - a).abs().mean() + (networks["a_to_b"](fake_a) - b).abs().mean()
            loss = loss + options.cycle * again
        if options.identity:
            same = (networks["a_to_b"](b) - b).abs().mean() + (networks["b_to_a"](a) - a).abs().mean()
            loss = loss + options.identity * options.cycle * same
        yield "g", loss

        of_both = []
        for name, real, fake in (("a", a, fake_a), ("b", b, fake_b)):
            fake = self.pool(name).exchange(fake, self.run.draw(partial(self.decide, name)))
            of_both.append(self.loss.discriminator(networks[f"d_{name}"](real), networks[f"d_{name}"](fake)))
        yield "d", of_discriminator * (of_both[0] + of_both[1])

    def pool(self, name: str) -> ImagePool:
        """The fakes of one domain."""
        pool = self.carried[name]
        assert isinstance(pool, ImagePool)
        return pool

    def decide(self, name: str) -> Tensor:
        """Which fakes of this step its pool keeps, and which it gives."""
        batch = self.config.batch_size
        own = part_of(batch, self.run.share)
        coins, places = torch.rand(batch), torch.randint(max(self.options.pool, 1), (batch,))
        return self.pool(name).decide(coins[own], places[own]).to(self.run.device)

    def extra_state(self) -> dict[str, Any]:
        return {name: self.pool(name).state() for name in self.carried}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for name, images in state.items():
            self.pool(name).load_state(images)

    def translate(self, images: Tensor, network: str = "a_to_b") -> Tensor:
        """Images [N, C, H, W] of one domain as those of the other, on the CPU; ``network`` is "a_to_b" or "b_to_a"."""
        like = next(self.networks[network].parameters())
        with self.evaluating():
            return torch.cat([self.networks[network](part.to(like)).cpu() for part in images.split(50)])

    def examples(self, number: int) -> tuple[Tensor, Tensor]:
        """Images of both domains to look at: held-out shapes, or the first of other data."""
        others = self.run.condition
        # A checkpoint without its data is looked at with shapes.
        held = hidden_pairs(self.run.samples if others is not None else plain(self.config.side), number)
        if held is not None or others is None:
            assert held is not None
            return held[:2]
        few = torch.arange(min(number, len(self.run.images), len(others)))
        return self.run.images[few].cpu(), others[few].cpu()

    def pictures(self) -> dict[str, Picture]:
        a, b = self.examples(8)
        to_b, to_a = self.translate(a), self.translate(b, "b_to_a")
        rows = [a, to_b, self.translate(to_b, "b_to_a"), b, to_a, self.translate(to_a)]
        return {"a, as b, and back; b, as a, and back": Picture(torch.cat(rows), len(a))}

    def figures(self) -> Figures:
        """``cycle``: |F(G(a)) - a| and |G(F(b)) - b|, their mean. On held-out plain and striped shapes also what
        :func:`stripe_figures` measures."""
        (a, b), held = self.examples(HELD_OUT), hidden_pairs(self.run.samples, HELD_OUT)
        to_b, to_a = self.translate(a), self.translate(b, "b_to_a")
        cycle = 0.5 * ((self.translate(to_b, "b_to_a") - a).abs() + (self.translate(to_a) - b).abs()).mean()
        return {"cycle": float(cycle)} | ({} if held is None else stripe_figures(to_b, to_a, *held))
