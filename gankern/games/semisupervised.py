"""A classifier that learns from unlabelled and generated images: K + 1 classes (Salimans 2016, arXiv 1606.03498, §5).

The discriminator has K logits l; the logit of the class "generated" is 0, since a function of x that is taken from all
logits changes nothing. With s = log(sum of exp(l)) it says D(x) = e^s / (e^s + 1), and minimises

    E [s(x) - l_y(x)] of labelled images
    + 1/2 E softplus(-s(x)) of unlabelled ones + 1/2 E softplus(s(G(z))).

The generator matches features: |E f(x) - E f(G(z))|^2, f the last hidden layer before its noise; of convolutional
networks, for colour images, the mean of |E f(x) - E f(G(z))|.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import losses
from gankern.games._game import Figures, Game, Loss, Picture, Player, Run
from gankern.games._semisupervised_networks import (
    Classifier,
    ConvolutionalClassifier,
    convolutional_generator,
    make_generator,
)
from gankern.models._record import Preset


class SemiSupervised(Game):
    """K classes, and one more."""

    family: ClassVar[str] = "codes and conditions"
    needs: ClassVar[str | None] = "labels"
    own_loss: ClassVar[bool] = True
    same_work = True
    held_out: ClassVar[float] = 0.25
    preset = Preset(loss="non_saturating", latent=50, width=128, lr=1e-3, steps=3000, checkpoint_every=500, evaluate=1)

    @dataclass(frozen=True)
    class Options:
        labels_per_class: int = 10
        unsupervised: float = 1.0  # weight of what unlabelled and generated images say; 0 is supervised training alone

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        shape, width = (config.channels, config.side, config.side), config.width
        self.convolutional = config.channels > 1 and config.side >= 16 and config.side % 8 == 0
        if self.convolutional:
            if width < 2:
                raise ValueError(f"semisupervised: width must be at least 2 for colour images, got {width}")
            self.networks = {
                "generator": convolutional_generator(*shape[:2], config.latent, width, run.layers),
                "classifier": ConvolutionalClassifier(config.channels, width, config.num_classes, run.layers),
            }
        else:
            pixels = config.channels * config.side**2
            # The paper's five layers of 1000, 500, 250, 250 and 250 at width 250; three of 2, 1 and 1 widths for 8x8.
            hidden = (2 * width, width, width) if config.side == 8 else (4 * width, 2 * width, width, width, width)
            wide = width if config.side == 8 else 2 * width
            self.networks = {
                "generator": make_generator((config.latent, wide, wide, pixels), shape, run.layers),
                "classifier": Classifier((pixels, *hidden, config.num_classes), run.layers, run.draw),
            }
        self.players = {"d": Player(("classifier",), "classifier"), "g": Player(("generator",), "generator")}
        if run.samples is not None:
            self.labelled, self.labels = self.choose_labelled()

    def choose_labelled(self) -> tuple[Tensor, Tensor]:
        """The first ``labels_per_class`` images of each class that are trained on: all that the labels are used of."""
        training, _ = self.run.held_out(self.held_out)
        labels, number = self.run.labels.cpu(), self.options.labels_per_class
        of_class = [training[labels[training] == c] for c in range(self.config.num_classes)]
        few = min(map(len, of_class))
        if not 1 <= number <= few:
            raise ValueError(f"semisupervised: labels_per_class must be from 1 to {few} for these data, got {number}")
        where = torch.cat([these[:number] for these in of_class])
        return self.run.images[where].to(self.run.device), labels[where].to(self.run.device)

    def moves(self) -> Iterator[tuple[str, Loss]]:
        config, options, run = self.config, self.options, self.run
        generator, classifier = self.networks["generator"], self.networks["classifier"]
        unlabelled, _ = run.batch()
        chosen = run.draw(lambda: run.own(torch.randint(len(self.labelled), (config.batch_size,))))
        loss = F.cross_entropy(classifier(self.labelled[chosen])[1], self.labels[chosen])
        if options.unsupervised:
            with torch.no_grad():
                fake = generator(run.uniform(config.latent))
            real, fake = (classifier(x)[1].logsumexp(1) for x in (unlabelled, fake))
            loss = loss - options.unsupervised * 0.5 * (F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean())
        yield "d", loss

        with torch.no_grad():
            features = classifier(unlabelled)[0]
        made = classifier(generator(run.uniform(config.latent)))[0]
        if self.convolutional:
            yield "g", (features.mean(0) - made.mean(0)).abs().mean()
        else:
            yield "g", losses.feature_matching(features, made) / features.shape[1]

    def pictures(self) -> dict[str, Picture]:
        latents = torch.rand(64, self.config.latent, generator=torch.Generator().manual_seed(self.config.seed))
        with self.evaluating():
            return {"samples": Picture(self.networks["generator"](latents.to(self.run.device)).cpu())}

    def figures(self) -> Figures:
        """``test_error``: the share of held-out images that the classifier gets wrong."""
        _, test = self.run.held_out(self.held_out)
        with self.evaluating():
            guesses = self.networks["classifier"](self.run.images[test].to(self.run.device))[1].argmax(1).cpu()
        return {"test_error": (guesses != self.run.labels.cpu()[test]).float().mean().item()}
