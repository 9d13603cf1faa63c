"""Images from files: a folder of pictures, and the python files of CIFAR-10.

A file that cannot be read is never passed over in silence: it stops the loading with its name, or, if that is asked
for, is logged and left out.
"""

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gankern.data.source import ImageSource

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC; Pillow is only imported where a picture is read


class BrokenFile(ValueError):
    """A file that cannot be read or is not what it should be; the message names it."""


class _Errors:
    """What to do about broken files: "stop" at the first, or "skip" them."""

    def __init__(self, on_error: str):
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
        self.stop = on_error == "stop"

    def handle(self, error: BrokenFile) -> None:
        if self.stop:
            raise BrokenFile(f"{error}; pass on_error='skip' to leave such files out") from error
        log.warning("left out: %s", error)


class ImageFolder(ImageSource):
    """The pictures below ``folder``, in the order of their paths, read when they are asked for.

    Args:
        size: crop each picture to its centre square and resize it to size × size. Without it, all pictures must be
            square and of one size already.
        channels: 3 (RGB) or 1 (grey): pictures of other kinds are converted.
        on_error: "stop" raises at the first broken file; "skip" logs it and leaves it out.
        verify: decode every picture once now, so that a broken one is found before a training begins and not hours
            into it. Without it only the headers are read, and a picture broken further on stops at its first use.

    Raises ``BrokenFile``, a ValueError with the file's name; FileNotFoundError for a folder without pictures.
    """

    def __init__(
        self,
        folder: Path | str,
        size: int | None = None,
        channels: int = 3,
        on_error: str = "stop",
        verify: bool = True,
    ):
        if channels not in MODES:
            raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {channels}")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        skip = _skips(on_error)
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise FileNotFoundError(f"there are no pictures ({', '.join(SUFFIXES)}) below {folder}")
        self.mode = MODES[channels]
        self.resizes = size is not None
        self.paths: list[Path] = []
        side = size
        for path in found:
            with _skipping(skip):
                width, height = self._open(path, decode=verify).size
                if not self.resizes and (width != height or side not in (None, width)):
                    expected = f"{side}x{side}, as {self.paths[0]} is" if side else "a square"
                    raise BrokenFile(
                        f"{path} is {width}x{height}, not {expected}; pass size=... (--size N --resize) to crop every "
                        "picture to its centre square and resize it"
                    )
                side = side or width
                self.paths.append(path)
        if not self.paths:
            raise BrokenFile(f"none of the {len(found)} pictures below {folder} can be used")
        self.shape = (len(self.paths), channels, side, side)

    def read(self, indices: Tensor) -> Tensor:
        size = self.shape[2]
        pixels = np.empty((len(indices), size, size, self.shape[1]), np.uint8)
        for row, index in zip(pixels, indices.tolist(), strict=True):
            image = self._open(self.paths[index], decode=True)
            if self.resizes:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                image = image.crop((left, top, left + side, top + side)).resize((size, size), BICUBIC)
            elif image.size != (size, size):
                raise BrokenFile(f"{self.paths[index]} is not {size}x{size} any more")
            row[...] = np.asarray(image).reshape(row.shape)
        return scaled(torch.from_numpy(pixels).permute(0, 3, 1, 2)).contiguous()

    def _open(self, path: Path, decode: bool):
        from PIL import Image

        try:
            with Image.open(path) as image:
                return image.convert(self.mode) if decode else image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BrokenFile(f"{path}: {error}") from error


def _skips(on_error: str) -> bool:
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
    return on_error == "skip"


@contextmanager
def _skipping(skip: bool) -> Iterator[None]:
    """Lets a broken file stop the loading, or logs it."""
    try:
        yield
    except BrokenFile as error:
        if not skip:
            raise BrokenFile(f"{error} (on_error='skip' leaves such files out)") from error
        log.warning("left out: %s", error)


def scaled(pixels: Tensor) -> Tensor:
    """uint8 0..255 → float32 in [−1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10 as its authors distribute it: pickles of {b"data": uint8 [10000, 3072], b"labels": list of 10000}

CIFAR10_FILES = [f"data_batch_{i}" for i in range(1, 6)]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values, and nothing that could run code."""

    def find_class(self, module: str, name: str):
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR-10 does")


def cifar10(folder: Path | str, on_error: str = "stop") -> tuple[Tensor, Tensor]:
    """CIFAR-10's 50,000 training images from its python files: [N, 3, 32, 32] in [−1, 1], and labels [N].

    ``folder`` is the ``cifar-10-batches-py`` of the archive. Raises ``BrokenFile`` with the name of a file that is
    missing, damaged or of another format, or with on_error="skip" logs it and goes on without.
    """
    skip = _skips(on_error)
    images, labels = [], []
    for name in CIFAR10_FILES:
        with _skipping(skip):
            pixels, numbers = _cifar10_file(Path(folder) / name)
            images.append(pixels)
            labels.append(numbers)
    if not images:
        raise BrokenFile(f"none of {', '.join(CIFAR10_FILES)} in {folder} can be used")
    return scaled(torch.cat(images)), torch.cat(labels)


def _cifar10_file(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        pixels = torch.from_numpy(content[b"data"])
        labels = torch.tensor(content[b"labels"])
    except FileNotFoundError as error:
        raise BrokenFile(f"{path}: there is no such file") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise BrokenFile(f"{path}: not a python file of CIFAR-10, or damaged ({error})") from error
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3072,) or labels.shape != pixels.shape[:1]:
        raise BrokenFile(
            f"{path}: expected uint8 data [N, 3072] and N labels, got {pixels.dtype} {tuple(pixels.shape)} "
            f"and {tuple(labels.shape)}"
        )
    return pixels.view(-1, 3, 32, 32), labels.long()
