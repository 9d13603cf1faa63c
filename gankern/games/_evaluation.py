"""Figures of merit while a model trains: what `gankern.metrics` has for its kind of samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import data, metrics
from gankern.core.evaluation import evaluating
from gankern.data import ImageSource, Points
from gankern.games._config import Config
from gankern.games._game import Figures
from gankern.metrics.transport import BATCH

SWD_PATCHES = 16  # from each image and band; the figures of a run compare with one another


class Judged(Protocol):
    """What is asked of a game: a generator against a discriminator."""

    discriminator: Any  # maker of logits [N]
    run: Any  # has its device

    def sample(self, latents: Tensor, labels: Tensor | None = None) -> Tensor: ...


class OnPoints:
    """On points whose distribution is known: modes, share of good samples, distances to as many new real points."""

    def __init__(self, config: Config, points: Points, labels: Tensor | None):
        self.config, self.points = config, points
        random = torch.Generator().manual_seed(config.seed)
        self.latents = torch.randn(config.evaluate_samples, config.latent, generator=random)
        self.real = points.sample(config.evaluate_samples, random)

    def __call__(self, game: Judged) -> Figures:
        fake = game.sample(self.latents)
        figures: Figures = {}
        if self.points.modes is not None and self.points.std is not None:
            coverage = metrics.mode_coverage(fake, self.points.modes, self.points.std)
            figures |= {"modes_covered": coverage.covered, "high_quality": coverage.high_quality}
        random = torch.Generator().manual_seed(0)
        figures["sliced_wasserstein"] = metrics.sliced_wasserstein(self.real, fake, 64, random)
        return figures | _progress(self.config, game, self.real, fake, ())


class OnImages:
    """On images: FID, KID and Inception score in a classifier's features, and sliced Wasserstein distance."""

    def __init__(self, config: Config, images: Tensor | ImageSource, labels: Tensor | None):
        number = min(config.evaluate_samples, len(images))
        random = torch.Generator().manual_seed(config.seed)
        self.config = config
        self.latents = torch.randn(number, config.latent, generator=random)
        chosen = torch.randperm(len(images), generator=random)[:number]
        self.real = images[chosen].cpu()
        self.labels = None if config.conditioning is None or labels is None else labels[chosen].cpu()
        self.extract = self._extractor(images, labels)
        self.features = self.extract(self.real).features

    def _extractor(self, images: Tensor | ImageSource, labels: Tensor | None) -> metrics.Extractor:
        config = self.config
        of_names = config.data in data.DATASETS or Path(config.data).exists()
        if config.features is not None:
            extract = metrics.load(config.features)
        elif not of_names and labels is not None and labels.ndim == 1:  # data of one's own
            extract = metrics.train_classifier((images, labels))[0]
        else:
            try:
                extract = metrics.trained(config.data, config.size)
            except ValueError as error:
                raise ValueError(
                    f"evaluate: there is nothing to train a classifier on ({error}); pass --features FILE, TorchScript "
                    "that returns features or a pair (features, logits)"
                ) from error
        # A network that grows makes small images at first.
        return replace(extract, prepare=lambda images: F.interpolate(images, size=(config.side, config.side)))

    def __call__(self, game: Judged) -> Figures:
        fake = game.sample(self.latents, self.labels)
        found = self.extract(fake.clamp(-1.0, 1.0))
        suffix = self.extract.suffix  # what the figures are called that compare with no paper's
        figures = {f"fid{suffix}": metrics.frechet_distance(self.features, found.features)}
        subset = min(1000, len(fake) // 2)
        figures[f"kid{suffix}"] = metrics.kernel_distance(self.features, found.features, 20, subset)[0]
        if found.logits is not None:
            figures[f"inception_score{suffix}"] = metrics.inception_score(found.logits)[0]
        real = data.resize(self.real, fake.shape[-1])
        if fake.shape[-1] >= 16:
            distances = metrics.laplacian_swd(real, fake, patches=SWD_PATCHES, projections=128)
            figures["swd"] = sum(distances.values()) / len(distances)
        return figures | _progress(self.config, game, real, fake, () if self.labels is None else (self.labels,))


@torch.no_grad()
def _progress(config: Config, game: Judged, real: Tensor, fake: Tensor, labels: tuple[Tensor, ...]) -> Figures:
    """What a Wasserstein critic says the distance is; nothing of other discriminators."""
    if config.loss != "wasserstein":
        return {}
    number = min(1024, len(real)) // 4 * 4  # minibatch standard deviation takes groups of four
    device = game.run.device
    critic = game.discriminator
    # The metric goes through both sets in batches of one size, and the labels are of the one as of the other.
    with_labels = cycle(zip(*(x[:number].to(device).split(BATCH) for x in labels)))
    with evaluating(critic):
        estimate = metrics.wasserstein_estimate(
            lambda x: critic(x, *next(with_labels)) if labels else critic(x),
            real[:number].to(device),
            fake[:number].to(device),
        )
    return {"wasserstein_estimate": estimate}
