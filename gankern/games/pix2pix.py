"""pix2pix: an image from an image, learnt from pairs (Isola 2016, arXiv 1611.07004).

D sees pairs; a is what is translated, b the image, sp the softplus, and d logits, one for each patch:

    L_D = 1/2 [E sp(-D(a, b)) + E sp(D(a, G(a)))]
    L_G = E sp(-D(a, G(a))) + 100 E |b - G(a)|

There is no latent vector: dropout is the only noise, and it stays on when images are made, as do the batch's own
statistics in batch norm. Of four frames it predicts the next one (Mathieu 2015, arXiv 1511.05440; Lotter 2015, arXiv
1511.06380): ``--data turning``, whose future is ambiguous.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gankern import losses
from gankern.data.drawn import LENGTH, Outlined, Turning
from gankern.data.shapes import coverage
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run
from gankern.games._translation import detail, foreground_iou, saturation
from gankern.models._record import Preset
from gankern.models.pix2pix import UNet, patchgan

MULTIPLES = (1, 2, 4, 8, 8, 8, 8, 8)  # of the width
SMALL = (1, 2, 4, 4)  # of images below 64 pixels
HELD_OUT = 500


class Pix2Pix(Game):
    """An image from an image."""

    family: ClassVar[str] = "image to image"
    needs: ClassVar[str | None] = "pairs"
    data: ClassVar[str] = "edges"
    preset = Preset(
        loss="non_saturating", latent=1, width=16, lr=1e-3, batch_size=16, steps=6000, decay_steps=6000,
        checkpoint_every=1500, evaluate=1,
    )  # fmt: skip
    same_work = True

    @dataclass(frozen=True)
    class Options:
        l1_weight: float = 100.0  # of the mean error
        squared: bool = False  # the mean squared error in the place of the absolute one
        adversarial_weight: float = 1.0  # 0: the error alone, without a discriminator
        strided: int = 1  # convolutions of stride 2 of the discriminator: a patch of 16 pixels; 3 are PatchGAN 70
        dropout: int = 1  # levels of the U-Net that have it; the paper has 3

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config, options = self.config, self.options
        self.refuse("latent", where="where images are made of images alone")
        if not options.adversarial_weight:
            self.refuse("strided", "loss", "real_target", where="with adversarial_weight 0, without a discriminator")
        if not options.l1_weight:
            self.refuse("squared", where="with l1_weight 0")
        halvings = min((config.side & -config.side).bit_length() - 1, len(MULTIPLES))
        multiples = SMALL if config.side < 64 else MULTIPLES
        if halvings < 2:
            raise ValueError(f"pix2pix: images of a size that can be halved twice or more, got {config.side}")
        widths = [config.width * m for m in multiples[:halvings]]
        inputs = config.num_classes  # channels of what is translated
        self.networks = {
            "generator": UNet(inputs, config.channels, widths, options.dropout, layers=run.layers),
            "discriminator": patchgan(inputs + config.channels, config.width, options.strided, layers=run.layers),
        }
        self.players = {"d": Player(("discriminator",)), "g": Player(("generator",))}
        self.loss = losses.get(config.loss, config.real_target)

    def moves(self) -> Iterator[tuple[str, Loss]]:
        options, discriminator = self.options, self.networks["discriminator"]
        image, given = self.run.batch()
        fake = self.networks["generator"](given)
        if options.adversarial_weight:
            real_logits = discriminator(torch.cat([given, image], 1))
            fake_logits = discriminator(torch.cat([given, fake.detach()], 1))
            yield "d", 0.5 * self.loss.discriminator(real_logits, fake_logits)
        error = fake - image
        loss = options.l1_weight * (error.square() if options.squared else error.abs()).mean()
        if options.adversarial_weight:
            loss = loss + options.adversarial_weight * self.loss.generator(discriminator(torch.cat([given, fake], 1)))
        yield "g", loss

    def translate(self, given: Tensor, seed: int = 0) -> Tensor:
        """Images of what is given [N, C, H, W], on the CPU: with dropout, and with the statistics of each batch of the
        size that is trained with. The running ones are left alone."""
        network = copy.deepcopy(self.networks["generator"]).train()
        like = next(network.parameters())
        # Dropout draws from the device's stream, which goes on afterwards as if nothing had been drawn; the others', of
        # the GPUs that are not in use here, are left alone.
        with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
            if like.is_cuda:
                with torch.cuda.device(like.device):
                    torch.cuda.manual_seed(seed)
            else:
                torch.default_generator.manual_seed(seed)
            return torch.cat([network(part.to(like)).cpu() for part in given.split(self.config.batch_size)])

    def held(self, number: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(images, what they are translated from, coverage of the shape), never trained on; None where the data are not
        ``edges``."""
        images, indices = self.run.samples, torch.arange(LENGTH, LENGTH + number)
        if not isinstance(images, Outlined):
            return None
        covered = coverage(images.factors(indices), self.config.side)
        return images.read(indices), images.conditions["edges"].read(indices), covered

    @staticmethod
    def futures(images: Turning, number: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Four frames that were never trained on, and the two images that may follow."""
        indices = torch.arange(LENGTH, LENGTH + number)
        return images.conditions["frames"].read(indices), images.futures(indices)

    def pictures(self) -> dict[str, Picture]:
        number = 8
        if isinstance(self.run.samples, Turning):
            given, futures = self.futures(self.run.samples, number)
            rows = [given[:, 9:], self.translate(given, self.config.seed), *futures]
            return {"last frame, made, both futures": Picture(torch.cat(rows), number)}
        held = self.held(number)
        if held is not None:
            images, given, _ = held
        else:
            source = Outlined(self.config.side) if self.run.condition is None else None
            condition = source.conditions["edges"] if source is not None else self.run.condition
            samples = source if source is not None else self.run.images
            assert condition is not None
            images, given = samples[torch.arange(number)].cpu(), condition[torch.arange(number)].cpu()
        made = self.translate(given, self.config.seed)
        rows = [given.expand(-1, 3, -1, -1) if given.shape[1] == 1 and images.shape[1] == 3 else given, made, images]
        if rows[0].shape[1] != images.shape[1]:
            rows = rows[1:]
        return {"given, made, real": Picture(torch.cat(rows), number)}

    def figures(self) -> Figures:
        """On held-out outlines: ``l1``; ``saturation``, the mean of it inside the shape as a share of the real images';
        ``detail``, the energy of the finest Laplacian band likewise; ``iou`` of what stands out from the background
        with the shape. On ``turning``, of frames never trained on: ``nearer``, the mean squared error against the
        nearer of the two images that may follow; ``turns_on``, how often that is the one in which the shape turns on.
        On other data ``l1`` alone, of the first images."""
        if isinstance(self.run.samples, Turning):
            given, futures = self.futures(self.run.samples, HELD_OUT)
            made = self.translate(given, self.config.seed).float()
            on, back = ((made - future).square().mean((1, 2, 3)) for future in futures)
            return {"nearer": torch.minimum(on, back).mean().item(), "turns_on": (on < back).float().mean().item()}
        held = self.held(HELD_OUT)
        if held is None:
            assert self.run.condition is not None
            few = torch.arange(min(HELD_OUT, len(self.run.images)))
            images, given = self.run.images[few].cpu(), self.run.condition[few].cpu()
            return {"l1": (self.translate(given, self.config.seed) - images).abs().mean().item()}
        images, given, covered = held
        made = self.translate(given, self.config.seed).float()
        return {
            "l1": (made - images).abs().mean().item(),
            "saturation": (saturation(made, covered) / saturation(images, covered)).item(),
            "detail": (detail(made) / detail(images)).item(),
            "iou": foreground_iou(made, covered).item(),
        }
