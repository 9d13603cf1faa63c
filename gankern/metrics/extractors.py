"""Where features come from: any network that is handed in, or a small classifier trained on the spot."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern import data
from gankern.core import extras
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import shown, whole
from gankern.core.evaluation import evaluating
from gankern.data import ImageSource
from gankern.metrics._checks import batches, check_samples

BATCH = 100
INCEPTION, CLASSIFIER = "Inception", "own classifier"
PUBLISHED = "inception-2015-12-05.pt (TorchScript) or pt_inception-2015-12-05-6726825d.pth"  # what the files are called


@dataclass(frozen=True)
class Features:
    """Of N images: ``features`` [N, D] for FID and KID, ``logits`` [N, classes] for the Inception score (or None)."""

    features: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network and how images [N, C, H, W] in [−1, 1] are put to it.

    ``network`` returns features [N, D], or a pair (features, logits). ``prepare`` is applied to each batch of images
    first: for a network that wants another size or range of values.

    >>> pixels = Extractor(nn.Flatten())
    >>> pixels(torch.zeros(4, 1, 8, 8)).features.shape
    torch.Size([4, 64])
    """

    network: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    prepare: Callable[[Tensor], Tensor] | None = None
    name: str = "own features"  # what its figures are of: "Inception" is the published one, and compares with papers

    @property
    def suffix(self) -> str:
        """What the names of its figures end with: nothing, of the published Inception alone."""
        return "" if self.name == INCEPTION else "_" + self.name.replace(" ", "_")

    def __post_init__(self) -> None:
        if not callable(self.network):
            raise TypeError(f"Extractor: network must be a function of images, got {shown(self.network)}")
        if self.prepare is not None and not callable(self.prepare):
            raise TypeError(f"Extractor: prepare must be a function of images or None, got {shown(self.prepare)}")

    @torch.no_grad()
    def __call__(self, images: Tensor | ImageSource) -> Features:
        """Features of all images, a batch at a time, in the network's evaluation mode; it is left in its own."""
        if isinstance(images, Tensor | ImageSource) and len(images.shape) and len(images) == 0:
            raise ValueError("Extractor: there are no images")
        check_samples("Extractor", "images", images)
        network = self.network
        with evaluating(network) if isinstance(network, nn.Module) else nullcontext():
            parts = [self._features(batch) for batch in batches("Extractor", "images", images, BATCH)]
        if len({len(part) for part in parts}) != 1:
            raise ValueError("Extractor: the network returned logits for some batches and none for others")
        return Features(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))

    def _features(self, batch: Tensor) -> tuple[Tensor, ...]:
        result = self.network(self.prepare(batch) if self.prepare else batch)
        parts = result if isinstance(result, tuple) else (result,)
        for part in parts:
            if not torch.is_tensor(part) or part.ndim != 2 or len(part) != len(batch) or len(parts) > 2:
                came = tuple(part.shape) if torch.is_tensor(part) else type(part).__name__
                came = came if len(parts) <= 2 else f"{len(parts)} values"
                raise ValueError(
                    f"Extractor: the network must return features [{len(batch)}, D] or a pair of features and "
                    f"logits, got {came}"
                )
        return parts


def load(path: Path | str, prepare: Callable[[Tensor], Tensor] | None = None) -> Extractor:
    """The network of a file: the published Inception, or any that returns features or a pair (features, logits).

    Of the Inception of FID (the weights of 2015) both published files are known by what they hold, and each gets images
    as it wants them: the TorchScript file of StyleGAN's authors, and the weights of pytorch-fid and torch-fidelity,
    which need the package torch-fidelity for the network. Any other file must be TorchScript (``torch.jit.save``), and
    is given images as they are, or what ``prepare`` makes of them.
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"path must be that of a TorchScript file, got {shown(path)}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no TorchScript file {path}")
    try:
        network: Any = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        return _of_weights(path, error)
    arguments = {argument.name for argument in network._c._get_method("forward").schema.arguments}
    if {"return_features", "no_output_bias"} <= arguments:
        return Extractor(_Inception(network), prepare or as_bytes, INCEPTION)
    return Extractor(network, prepare)


def _of_weights(path: Path, error: RuntimeError) -> Extractor:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file of somebody else's can fail in any way
        raise ValueError(f"{path} is not a TorchScript file (made by torch.jit.save), or it is damaged") from error
    keys = set(weights) if isinstance(weights, dict) else set()
    if not {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight", "fc.weight"} <= keys:
        raise ValueError(f"{path} holds weights, and not those of the Inception of FID: it is published as {PUBLISHED}")
    if weights["fc.weight"].shape != (1008, 2048):
        raise ValueError(
            f"{path} holds an Inception with {len(weights['fc.weight'])} classes, torchvision's; that of FID has 1008, "
            f"and is published as {PUBLISHED}"
        )
    fidelity = extras.load("torch_fidelity.feature_extractor_inceptionv3", "the Inception of weights alone")
    network = fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    return Extractor(network, as_bytes, INCEPTION)


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the Inception of FID takes them: uint8, and three channels. It resizes them by itself."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return (images.clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8)


class _Inception(nn.Module):
    """StyleGAN's file: its features, and the logits of its classes without their bias, as published scores have it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.network(images, no_output_bias=True)
        # Whose logarithms are logits: the softmax of them is what they are of.
        return self.network(images, return_features=True), probabilities.clamp_min(1e-37).log()


class Classifier(nn.Module):
    """Images [N, C, size, size] → (features [N, 64], logits [N, classes]): two or more 3×3 convolutions and means."""

    def __init__(self, size: int, channels: int, classes: int):
        super().__init__()
        widths = [channels, 16, 32, 64, 64, 64][: max(2, size.bit_length() - 2)]
        blocks = []
        for before, after in pairwise(widths):
            blocks += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            blocks += [nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.hidden = nn.Linear(4 * widths[-1], 64)
        self.output = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.hidden(self.blocks(images)))
        return features, self.output(features)


def trained(name: str = "mnist5k", size: int | None = None, seed: int = 0) -> Extractor:
    """A small classifier of a data set that has labels, trained now, in seconds: the extractor where none is handed in.

    Four fifths of (at most 5,000 of) the images are for training. One seed gives one network, on one machine with one
    number of threads. Scores with it compare with others of the same network alone. Kept for the life of the process.
    """
    # A relative path is another folder from another place.
    return _kept(name if name in data.DATASETS else str(Path(name).resolve()), size, seed)


@cache
def _kept(name: str, size: int | None, seed: int) -> Extractor:
    return train_classifier(name, size, seed=seed)[0]


def train_classifier(
    name: str | tuple[Tensor | ImageSource, Tensor], size: int | None = None, steps: int = 250, seed: int = 0
) -> tuple[Extractor, float]:
    """The classifier after ``steps`` batches of 100, and its accuracy on the images that it was not trained on.

    ``name`` is a data set's, or a pair of images [N, C, H, W] and labels [N] of one's own.
    """
    steps, seed = whole("train_classifier: steps", steps, least=1), check_seed("train_classifier: seed", seed)
    images: Any
    labels: Any
    if isinstance(name, tuple):
        images, labels = name
    else:
        images = data.load(name, size)
        labels = data.condition(name, images, "labels")
    assert not isinstance(images, data.Points) and isinstance(labels, Tensor)  # points have no labels
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too, for good
        chosen = torch.randperm(len(images))[:5000]
        images, labels = images[chosen].cpu(), labels[chosen].cpu()
        split = len(images) * 4 // 5
        network = Classifier(images.shape[-1], images.shape[1], int(labels.max()) + 1)
        optimiser = torch.optim.Adam(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
        for _ in range(steps):
            batch = torch.randint(split, (BATCH,))
            loss = F.cross_entropy(network(images[batch])[1], labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    extractor = Extractor(network.eval().requires_grad_(False), name=CLASSIFIER)
    logits = extractor(images[split:]).logits
    assert logits is not None  # a Classifier returns them
    return extractor, (logits.argmax(1) == labels[split:]).double().mean().item()
