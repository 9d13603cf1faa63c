"""What people have in their hands: tensors, arrays, torch Datasets and DataLoaders, torchvision's, Hugging Face's.

Nothing of torchvision or Hugging Face is imported: whatever has a length and items is a data set, and an item is an
image, a pair (image, label), or a dictionary that holds them.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gankern.core.arguments import shown, whole
from gankern.data.images import grey, load, resize
from gankern.data.points import Points
from gankern.data.source import ImageSource

IMAGES = ("image", "img", "images", "pixel_values")  # what the image of an item is called, where it is a dictionary
LABELS = ("label", "labels", "fine_label", "target", "class")
LOOKED_AT = 32  # items of a data set, before it is trained on; every one is looked at when it is used
SLACK = 1e-3  # of a range: images that were resized overshoot a little


def wrap(
    samples: Any,
    size: int | None = None,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> Tensor | ImageSource | Points:
    """Anything that holds images as what :mod:`gankern.training` takes: [N, C, H, W] float32 in [-1, 1].

    Args:
        samples: a tensor [N, C, H, W]; an array [N, C, H, W] or [N, H, W, C], or [N, H, W] of grey images; a torch
            ``Dataset`` with a length, torchvision's or Hugging Face's; a ``DataLoader``; images that are iterated over
            (an ``IterableDataset``), which are read into memory; a folder's path. An item is an image, a pair (image,
            label), or a dictionary; an image is a tensor [C, H, W], an array, or a picture of Pillow's.
        size: crop each image to its centre square and resize it. Without it all must be of one size.
        channels: 1 or 3: convert grey images or those of three channels; by default they are what the first one is.
        value_range: what is black and what is white. uint8 and pictures are from 0 to 255. Floating-point numbers are
            from -1 to 1, and images of which none is below 0 are refused, as they may be from 0 to 1 (ToTensor's):
            (0, 1) says that they are, (-1, 1) that they are not.

    A data set is read when its images are asked for. ``labels(wrapped)`` are its labels. What is a tensor in range, an
    ``ImageSource`` or ``Points`` already is given back.

    Raises: TypeError for what holds no images, ValueError where their shape or range is wrong.

    >>> wrap(torch.zeros(2, 8, 8, dtype=torch.uint8)).shape, wrap(np.zeros((2, 8, 8, 3), np.uint8)).unique()
    (torch.Size([2, 1, 8, 8]), tensor([-1.]))
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {shown(channels)}")
    if isinstance(samples, str | PathLike):
        return load(str(samples), size, channels)
    if isinstance(samples, Points | ImageSource):
        return samples
    if isinstance(samples, DataLoader):
        data: Any = samples.dataset
        # Its batches are not the run's; its images are, unless it has them made (or taken together) by itself.
        samples = data if _is_data_set(data) else (image for batch in samples for image in _unbatched(batch))
    form = _Form(size, channels, value_range)
    if isinstance(samples, Tensor | np.ndarray):
        return _all_at_once(samples, form)
    if _is_data_set(samples):
        return _DataSet(samples, form)
    if not isinstance(samples, Iterable) or isinstance(samples, Mapping | set):
        raise TypeError(f"samples must be images: a tensor, an array, a data set or a DataLoader, got {shown(samples)}")
    return _DataSet(list(samples), form)


def labels(samples: Any) -> Tensor | None:
    """The labels [N] int64 of what :func:`wrap` gave, or of a folder of classes; None where it has none."""
    if not isinstance(samples, ImageSource):
        return None
    try:
        found = getattr(samples, "labels", None)
    except ValueError:  # a folder without class folders
        return None
    return found if isinstance(found, Tensor) else None


def _is_data_set(samples: Any) -> bool:
    return hasattr(samples, "__len__") and hasattr(samples, "__getitem__") and not isinstance(samples, str | Mapping)


def _unbatched(batch: Any) -> list[Any]:
    """The items of a batch that a DataLoader made."""
    if isinstance(batch, Mapping):
        return [dict(zip(batch, item)) for item in zip(*batch.values())]
    return list(zip(*batch)) if isinstance(batch, tuple | list) else list(batch)


class _Form:
    """How images are to be: what is asked for, and what the first one settled."""

    def __init__(self, size: int | None, channels: int | None, value_range: tuple[float, float] | None):
        self.size = None if size is None else whole("size", size, least=1)
        self.channels, self.asked = channels, value_range is not None
        self.low, self.high = (-1.0, 1.0) if value_range is None else map(float, value_range)
        if not self.low < self.high:
            raise ValueError(f"value_range must be (black, white), got {value_range}")

    def __call__(self, name: str, image: Any) -> Tensor:
        """One image as [C, H, W]."""
        pixels = self._in_range(name, _pixels(name, image))
        if self.channels not in (None, len(pixels)):
            if {self.channels, len(pixels)} != {1, 3}:
                raise ValueError(f"{name} has {len(pixels)} channels, not {self.channels}")
            pixels = grey(pixels) if self.channels == 1 else pixels.expand(3, -1, -1)
        return pixels if self.size is None else resize(pixels[None], self.size)[0]

    def _in_range(self, name: str, pixels: Tensor) -> Tensor:
        """In [-1, 1], of the values of one image or many."""
        if pixels.dtype == torch.uint8:
            return pixels.float() / 127.5 - 1.0
        if not pixels.is_floating_point():
            raise ValueError(f"{name} must be of uint8 or of floating-point numbers, got {shown(pixels)}")
        pixels = pixels.to(torch.get_default_dtype())
        known = pixels.numel() and not pixels.is_meta  # which has a shape and no values
        low, high = (x.item() for x in pixels.aminmax()) if known else (self.low, self.high)
        slack = SLACK * (self.high - self.low)
        if not (self.low - slack <= low and high <= self.high + slack):
            hint = "" if self.asked else "; gankern.data.wrap(samples, value_range=(black, white)) says what they mean"
            raise ValueError(
                f"{name} has values from {low:g} to {high:g}, not from {self.low:g} to {self.high:g}{hint}"
            )
        if (self.low, self.high) == (-1.0, 1.0):
            return pixels
        return ((pixels - self.low) * (2.0 / (self.high - self.low)) - 1.0).clamp(-1.0, 1.0)

    def check_not_halved(self, name: str, kind: torch.dtype, lowest: float, highest: float) -> None:
        """Refuses floats from 0 to 1 that nobody said a word about: as [-1, 1] they are grey to white."""
        if not self.asked and kind != torch.uint8 and 0.0 <= lowest < highest:
            raise ValueError(
                f"{name} are from {lowest:g} to {highest:g}, none below 0: "
                "gankern.data.wrap(samples, value_range=(0, 1)) scales them to [-1, 1], "
                "value_range=(-1, 1) takes them as they are"
            )


def _pixels(name: str, image: Any) -> Tensor:
    """One image as [C, H, W], its values as they are."""
    if hasattr(image, "convert") and hasattr(image, "mode"):  # Pillow's
        return _of_picture(name, image)
    pixels = torch.as_tensor(image) if isinstance(image, Tensor | np.ndarray) else None
    if pixels is None or pixels.ndim not in (2, 3):
        raise TypeError(f"{name} must be a tensor [C, H, W], an array or a picture, got {shown(image)}")
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.shape[0] not in (1, 3) and pixels.shape[2] in (1, 3):
        return pixels.permute(2, 0, 1)
    return pixels


def _of_picture(name: str, image: Any) -> Tensor:
    if image.mode not in ("1", "L", "RGB", "P", "RGBA", "LA", "CMYK", "YCbCr"):
        raise ValueError(f"{name} is a picture of the kind {image.mode!r}: convert it to RGB or L first")
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:
            raise ValueError(f"{name} is transparent in parts: put it on a background first")
    values = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    return torch.from_numpy(values[None] if values.ndim == 2 else values.transpose(2, 0, 1).copy())


def _all_at_once(samples: Tensor | np.ndarray, form: _Form) -> Tensor | ImageSource:
    images = torch.as_tensor(samples)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or not len(images):
        raise ValueError(f"samples must be images [N, C, H, W], N at least 1, got {shown(images)}")
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        if isinstance(samples, Tensor):
            raise ValueError(f"samples must be [N, C, H, W], got {shown(images)}: samples.permute(0, 3, 1, 2) is that")
        images = images.permute(0, 3, 1, 2)
    elif images.shape[3] in (2, 4) and min(images.shape[1:3]) > 4:
        raise ValueError(f"samples must have 1 or 3 channels, got what looks like [N, H, W, C]: {shown(images)}")
    plain = images.dtype == torch.float32 and not form.asked and form.size is None and form.channels is None
    ranged = form._in_range("samples", images)
    if images.is_floating_point() and not images.is_meta:  # which has a shape and no values
        lowest, highest = (x.item() for x in images.aminmax())
        form.check_not_halved("samples", images.dtype, lowest, highest)
    if plain and isinstance(samples, Tensor) and ranged.shape == samples.shape:
        return samples
    if form.channels not in (None, ranged.shape[1]):
        if {form.channels, ranged.shape[1]} != {1, 3}:
            raise ValueError(f"samples have {ranged.shape[1]} channels, not {form.channels}")
        ranged = grey(ranged) if form.channels == 1 else ranged.expand(-1, 3, -1, -1)
    ranged = (ranged if form.size is None else resize(ranged, form.size)).contiguous()
    # What is bright throughout would be refused by the next one who is given it.
    return _InMemory(ranged) if ranged.amin() >= 0.0 else ranged


class _InMemory(ImageSource):
    """Images whose range was said."""

    def __init__(self, images: Tensor):
        self.images, self.shape = images, tuple(images.shape)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


class _DataSet(ImageSource):
    """A data set with a length, read when its images are asked for."""

    def __init__(self, items: Any, form: _Form):
        if not len(items):
            raise ValueError("samples holds no images")
        self.items, self.form = items, form
        first = self._image(0)
        form.channels = form.channels or len(first)  # of the others, too
        self.shape = (len(items), *first.shape)
        looked_at = torch.linspace(0, len(items) - 1, min(LOOKED_AT, len(items))).long()
        images = self.read(looked_at)
        raw = _pixels("samples[0]", _split(items[0])[0])
        low, high = (x.item() for x in images.aminmax())
        form.check_not_halved("samples", raw.dtype, low, high)

    def _image(self, index: int) -> Tensor:
        name = f"samples[{index}]"
        return self.form(name, _split(self.items[index], name)[0])

    def read(self, indices: Tensor) -> Tensor:
        images = []
        for index in indices.tolist():
            image = self._image(index)
            if image.shape != self.shape[1:]:
                came, first = ("x".join(map(str, shape)) for shape in (image.shape, self.shape[1:]))
                raise ValueError(
                    f"samples[{index}] is {came}, not {first} as the first: gankern.data.wrap(samples, size=N) crops "
                    "and resizes them"
                )
            images.append(image)
        return torch.stack(images) if images else torch.empty(0, *self.shape[1:])

    @property
    def labels(self) -> Tensor | None:
        """Of every item: from a column or attribute of the data set where it has one, or else by reading all."""
        found = self._column()
        if found is None:
            if _split(self.items[0])[1] is None:
                return None
            found = [_split(self.items[i])[1] for i in range(len(self.items))]
        values = torch.as_tensor(np.asarray(found))
        if values.ndim != 1 or values.is_floating_point() or len(values) != len(self.items):
            raise ValueError(f"the labels of samples must be {len(self.items)} integers, got {shown(values)}")
        return values.long()

    def _column(self) -> Any:
        columns = getattr(self.items, "column_names", None)  # Hugging Face's
        if isinstance(columns, list):
            name = next((name for name in LABELS if name in columns), None)
            return None if name is None else self.items[name]
        targets = getattr(self.items, "targets", None)  # torchvision's
        return targets if targets is not None and len(targets) == len(self.items) else None


def _split(item: Any, name: str = "samples[0]") -> tuple[Any, Any]:
    """An item's image and label; None where it has none."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGES if key in item), None)
        if image is None:
            raise TypeError(f"{name} has {', '.join(map(str, item))}, and no image ({', '.join(IMAGES)})")
        return image, next((item[key] for key in LABELS if key in item), None)
    if isinstance(item, tuple | list):
        if not item:
            raise TypeError(f"{name} is empty")
        return item[0], item[1] if len(item) > 1 else None
    return item, None
