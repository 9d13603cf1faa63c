"""Whether samples are copies of the training data: the nearest training example of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gankern.data import ImageSource
from gankern.metrics._checks import batches, check_samples

BATCH = 256


@dataclass(frozen=True)
class Nearest:
    """Of N samples: the ``index`` [N] of the nearest training example, and the Euclidean ``distance`` [N] to it."""

    index: Tensor
    distance: Tensor


@torch.no_grad()
def nearest_examples(samples: Tensor | ImageSource, training: Tensor | ImageSource) -> Nearest:
    """For each sample x argmin over i of ‖x − t_i‖₂, the first of several; and that distance.

    ``samples`` [N, ...] and ``training`` [M, ...] are images, points, or features of either, of which distances say
    more (:class:`Extractor` makes them). The distances are computed in fp64, as differences: a copy is at 0.

    >>> nearest_examples(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 3.0], [1.0, 1.0]]))
    Nearest(index=tensor([1]), distance=tensor([1.], dtype=torch.float64))
    """
    _check("nearest_examples", samples=samples, training=training)
    wanted = torch.cat([_flat(batch) for batch in batches("nearest_examples", "samples", samples, BATCH)])
    index = torch.zeros(len(wanted), dtype=torch.long, device=wanted.device)
    distance = torch.full((len(wanted),), torch.inf, dtype=torch.float64, device=wanted.device)
    for start, examples in enumerate(batches("nearest_examples", "training", training, BATCH)):
        gaps = torch.cdist(wanted, _flat(examples).to(wanted.device), compute_mode="donot_use_mm_for_euclid_dist")
        nearest, where = gaps.min(1)
        index = torch.where(nearest < distance, start * BATCH + where, index)
        distance = torch.minimum(nearest, distance)
    return Nearest(index, distance)


def memorisation(
    samples: Tensor | ImageSource, training: Tensor | ImageSource, held_out: Tensor | ImageSource
) -> float:
    """How often a sample is nearer to the training data than a held-out image is: P(d(sample) < d(held out)), where d
    is the distance to the nearest training example, and ties count half.

    0.5 where nothing was memorised and samples are as real images are, near 1 where samples are copies; below 0.5
    they are farther from the data than real images.

    >>> training = torch.arange(10.0)[:, None]
    >>> memorisation(training[:3], training, torch.tensor([[0.4], [20.0]]))
    1.0
    """
    _check("memorisation", samples=samples, training=training, held_out=held_out)
    of_samples, of_held_out = (nearest_examples(x, training).distance for x in (samples, held_out))
    of_held_out = of_held_out.sort().values
    above = len(of_held_out) - torch.searchsorted(of_held_out, of_samples, right=True)
    not_below = len(of_held_out) - torch.searchsorted(of_held_out, of_samples)
    return (above + not_below).double().mean().item() / (2 * len(of_held_out))


@torch.no_grad()
def beside_nearest(samples: Tensor, training: Tensor | ImageSource) -> Tensor:
    """A picture of it: [2·N, C, H, W], each of the images [N, C, H, W] and after it the nearest training image.

    >>> beside_nearest(torch.rand(3, 1, 8, 8), torch.rand(20, 1, 8, 8)).shape
    torch.Size([6, 1, 8, 8])
    """
    index = nearest_examples(samples, training).index
    return torch.stack([samples, training[index.cpu()].to(samples)], 1).flatten(0, 1)


def _flat(batch: Tensor) -> Tensor:
    return batch.detach().flatten(1).to(torch.float64)


def _check(function: str, **sets: Tensor | ImageSource) -> None:
    first = next(iter(sets.values()))
    for name, values in sets.items():
        check_samples(function, name, values)
        if len(values.shape) < 2:
            raise ValueError(
                f"{function}: {name} must be [N, ...] with a dimension of values, got {tuple(values.shape)}"
            )
        if values.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{function}: samples and {name} must be of one kind, got {tuple(first.shape)} and "
                f"{tuple(values.shape)}"
            )
