"""What a classifier, or a code, says of samples: whether it is the class asked for, and how much of it they tell."""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import shown, whole
from gankern.metrics._checks import check_finite, check_numbers
from gankern.metrics.fidelity import ms_ssim


def label_accuracy(asked: Tensor, seen: Tensor) -> float:
    """The share of samples in which the class is seen that was asked for; ``asked`` and ``seen`` [N] are classes.

    >>> label_accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
    0.75
    """
    asked, seen = _classes("label_accuracy", asked=asked, seen=seen)
    return (asked == seen).double().mean().item()


def within_class_diversity(samples: Tensor, classes: Tensor) -> float:
    """The mean over the classes, and over pixels, of the standard deviation within a class; 0 where each class has one
    picture. A class of which there is one sample has none, and is left out.

    ``samples`` [N, ...] and ``classes`` [N]. As a share of the real data's it says how much of a class's variety a
    conditional generator has: 1 is all of it.

    >>> within_class_diversity(torch.tensor([[0.0], [2.0], [5.0], [5.0]]), torch.tensor([0, 0, 1, 1]))
    0.7071067811865476
    """
    (classes,) = _classes("within_class_diversity", classes=classes)
    check_numbers("within_class_diversity", "samples", samples)
    if samples.ndim < 2 or len(samples) != len(classes):
        raise ValueError(
            f"within_class_diversity: samples must be [N, ...] of {len(classes)} classes, got {tuple(samples.shape)}"
        )
    check_finite("within_class_diversity", "samples", samples)
    values, classes = samples.detach().double(), classes.to(samples.device)
    groups = [values[classes == c] for c in classes.unique()]
    spreads = [group.std(0).mean() for group in groups if len(group) > 1]
    if not spreads:
        raise ValueError("within_class_diversity: there is no class of which there are two samples")
    return torch.stack(spreads).mean().item()


def within_class_similarity(samples: Tensor, classes: Tensor, pairs: int = 100, seed: int = 0) -> float:
    """The mean over the classes of the mean :func:`gankern.metrics.ms_ssim` of ``pairs`` random pairs of different
    samples of a class: the higher it is, the less diverse they are (Odena 2016, arXiv 1610.09585, section 4.2). 1 where
    each class has one picture. It says something beside the same of real images, of the same size.

    ``samples`` [N, C, H, W] in [-1, 1] and ``classes`` [N]; a class of which there is one sample is left out. ``seed``
    decides the pairs.

    >>> within_class_similarity(torch.zeros(4, 1, 16, 16), torch.tensor([0, 0, 1, 1]))
    1.0
    """
    (classes,) = _classes("within_class_similarity", classes=classes)
    pairs = whole("within_class_similarity: pairs", pairs, least=1)
    if not isinstance(samples, Tensor) or samples.ndim != 4 or len(samples) != len(classes):
        raise ValueError(
            f"within_class_similarity: samples must be [{len(classes)}, C, H, W], one for each of classes, got "
            f"{shown(samples)}"
        )
    random = torch.Generator().manual_seed(check_seed("within_class_similarity: seed", seed))
    means = []
    for members in ((classes == c).nonzero()[:, 0].cpu() for c in classes.unique()):
        if len(members) > 1:
            first = torch.randint(len(members), (pairs,), generator=random)
            other = (first + torch.randint(1, len(members), (pairs,), generator=random)) % len(members)
            means.append(ms_ssim(samples[members[first]], samples[members[other]]).mean())
    if not means:
        raise ValueError("within_class_similarity: there is no class of which there are two samples")
    return torch.stack(means).mean().item()


def mutual_information_bound(logits: Tensor, codes: Tensor, entropy: float | None = None) -> float:
    """A lower bound, in nats, of the mutual information of a class and what was made of it: E log Q(c | x) + H(c) (Chen
    2016, InfoGAN, arXiv 1606.03657).

    ``logits`` [N, K] are Q's of samples made of the classes ``codes`` [N]. ``entropy`` is H(c), by default log K, that
    of uniform classes. At most H(c), where Q is always right and sure; it may be negative.

    >>> round(mutual_information_bound(torch.tensor([[9.0, -9.0], [-9.0, 9.0]]), torch.tensor([0, 1])), 4)
    0.6931
    """
    (codes,) = _classes("mutual_information_bound", codes=codes)
    check_numbers("mutual_information_bound", "logits", logits)
    if logits.ndim != 2 or len(logits) != len(codes) or int(codes.max()) >= logits.shape[1]:
        raise ValueError(
            f"mutual_information_bound: logits must be [{len(codes)}, K] with K above the largest code, "
            f"{int(codes.max())}, got {tuple(logits.shape)}"
        )
    check_finite("mutual_information_bound", "logits", logits)
    likelihood = -F.cross_entropy(logits.detach().double(), codes.to(logits.device)).item()
    return likelihood + (log(logits.shape[1]) if entropy is None else entropy)


def assignment_accuracy(codes: Tensor, labels: Tensor) -> float:
    """The accuracy of the best assignment of codes [N] to labels [N], each code to another label (Hungarian method):
    what clusters, or the classes of a code that was learnt without labels, are worth. Needs SciPy.

    >>> assignment_accuracy(torch.tensor([1, 1, 0, 2]), torch.tensor([5, 5, 3, 3]))
    0.75
    """
    codes, labels = _classes("assignment_accuracy", codes=codes, labels=labels)
    assign = extras.load("scipy.optimize", "assignment_accuracy", "train").linear_sum_assignment
    codes, labels = codes.unique(return_inverse=True)[1].cpu(), labels.unique(return_inverse=True)[1].cpu()
    table = torch.zeros(int(codes.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    table.index_put_((codes, labels), torch.ones((), dtype=torch.float64), accumulate=True)
    rows, columns = assign(-table.numpy())
    return table[rows, columns].sum().item() / len(codes)


def _classes(function: str, **given: Tensor) -> list[Tensor]:
    """Each [N] of whole numbers from 0, N the same of all."""
    first = next(iter(given.values()))
    for name, classes in given.items():
        check_numbers(function, name, classes)
        if classes.ndim != 1 or len(classes) == 0 or len(classes) != len(first):
            raise ValueError(f"{function}: {name} must be [N] with one N of at least 1, got {tuple(classes.shape)}")
        if classes.is_floating_point():
            raise TypeError(f"{function}: {name} must be whole numbers, got {classes.dtype}")
        if int(classes.min()) < 0:
            raise ValueError(f"{function}: {name} must be 0 or more, got {int(classes.min())}")
    return [classes.long() for classes in given.values()]
