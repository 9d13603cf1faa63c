"""Images from files: a folder of pictures, and the python files of CIFAR-10.

A file that cannot be read is never passed over in silence: it stops the loading with its name, or, if that is asked
for, is logged and left out.
"""

import io
import logging
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import shown, whole
from gankern.core.files import UnusableFile
from gankern.data.pickles import read_batch
from gankern.data.source import ImageSource

if TYPE_CHECKING:
    from PIL import Image as Pillow

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC; Pillow is only imported where a picture is read


class BrokenFile(UnusableFile):
    """A file that cannot be read or is not what it should be; the message names it."""


class ImageFolder(ImageSource):
    """The pictures below ``folder``, or in a zip file, in the order of their paths, read when they are asked for.

    Black is −1 and white is 1, whatever a file's number of bits: grey pictures of 12 or 16 bits keep their precision
    (colours of 16 bits are read to 8). Palettes and CMYK become RGB; a camera's note on which side is up (EXIF) is
    obeyed. What has no one reading is refused by name: transparent pixels, files of several pictures, and numbers whose
    black and white are not known (floats, signed integers, integers of 32 bits).

    Args:
        size: crop each picture to its centre square and resize it to size × size. Without it, all pictures must be
            square and of one size already.
        channels: 3 (RGB) or 1 (grey): pictures of other kinds are converted; None is 1 where all of them are grey.
        on_error: "stop" raises at the first broken file; "skip" logs it and leaves it out.
        verify: decode every picture once now, so that a broken one is found before a training begins and not hours
            into it. Without it only the headers are read, and a picture broken further on stops at its first use.

    ``labels`` are of the folders that the pictures lie in, where each is in one.

    Raises ``BrokenFile``, a ValueError with the file's name; FileNotFoundError for a folder without pictures.
    """

    def __init__(
        self, folder: Path | str, size: int | None = None, channels: int | None = 3, on_error: str = "stop",
        verify: bool = True,
    ):  # fmt: skip
        size, skip = _checked(size, 3 if channels is None else channels, on_error)
        self.folder, found = _below(folder)
        if channels is None:
            channels = 1 if all(map(_is_grey, found)) else 3
        self.mode, self.resizes = MODES[channels], size is not None
        self.paths: list[Path] = []
        side = size
        for path in found:
            with _skipping(skip):
                extent = _picture(path, self.mode).size if verify else _size(path)
                side = size or _square(path, extent, side, self.paths)
                self.paths.append(path)
        if not self.paths or side is None:
            raise BrokenFile(f"none of the {len(found)} pictures below {folder} can be used")
        self.shape = (len(self.paths), channels, side, side)

    @property
    def classes(self) -> list[str]:
        """The names of the class folders: the folders in ``folder`` that hold its pictures, at any depth. A ValueError
        where there are no two, or where a picture is in none."""
        parts = [path.relative_to(self.folder).parts for path in self.paths]
        outside = [path for path, part in zip(self.paths, parts) if len(part) == 1]
        classes = sorted({part[0] for part in parts if len(part) > 1})
        if outside or len(classes) < 2:
            reason = f"{outside[0]} is in none" if outside else f"{classes[0]} is the only one"
            raise ValueError(
                f"the pictures of {self.folder} have no labels: these come from a folder for each class, two at least, "
                f"and {reason}"
            )
        return classes

    @property
    def labels(self) -> Tensor:
        """Which of the ``classes`` each picture is of, [N] int64."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([numbers[path.relative_to(self.folder).parts[0]] for path in self.paths])

    def read(self, indices: Tensor) -> Tensor:
        paths = [self.paths[index] for index in indices.tolist()]
        return _as_images(((path, _picture(path, self.mode)) for path in paths), self.shape, self.resizes)


# ------------------------------------------------------------------------------------------------------------
# Two domains: pairs, and pictures without pairs

DOMAINS = (("A", "B"), ("trainA", "trainB"))  # what the folders of two domains are called


class ImagePairs(ImageSource):
    """Pictures below ``folder`` that belong together two by two: an image is the second of a pair (B), and its
    condition "pairs" the first (A), which a model translates from.

    Either the two lie in folders ``A`` and ``B`` (or ``trainA`` and ``trainB``) under one name, or, where there are no
    such folders, side by side in one picture, A to the left. The two of a pair must be of one size. The arguments and
    errors are :class:`ImageFolder`'s; a picture without its counterpart is a broken file.
    """

    def __init__(
        self, folder: Path | str, size: int | None = None, channels: int = 3, on_error: str = "stop",
        verify: bool = True,
    ):  # fmt: skip
        size, skip = _checked(size, channels, on_error)
        self.mode, self.resizes = MODES[channels], size is not None
        self.sources: list[tuple[Path, Path]] = []  # of A and of B; one path twice where they lie side by side
        side = size
        for path, first, second in _pairs(folder):
            with _skipping(skip):
                if first is None or second is None:
                    raise BrokenFile(f"{path} has no counterpart: the two pictures of a pair have one name in A and B")
                extents = [_picture(p, self.mode).size if verify else _size(p) for p in dict.fromkeys((first, second))]
                if first == second:
                    width, height = extents[0]
                    if width % 2:
                        raise BrokenFile(f"{path} is {width} pixels wide: two pictures side by side are of one width")
                    extents = [(width // 2, height)]
                if len(set(extents)) > 1:
                    (width, height), other = extents[0], "x".join(map(str, extents[1]))
                    raise BrokenFile(f"{first} is {width}x{height}, and {second} {other}: pairs must be of one size")
                side = size or _square(path, extents[0], side, [pair[0] for pair in self.sources])
                self.sources.append((first, second))
        if not self.sources or side is None:
            raise BrokenFile(f"none of the pairs below {folder} can be used")
        self.shape = (len(self.sources), channels, side, side)

    @property
    def conditions(self) -> dict[str, ImageSource]:
        return {"pairs": _FirstOfPairs(self)}

    def read(self, indices: Tensor) -> Tensor:
        return self.read_half(indices, 1)

    def read_half(self, indices: Tensor, which: int) -> Tensor:
        """The images of A (0) or B (1)."""

        def half(sources: tuple[Path, Path]) -> tuple[Path, "Pillow.Image"]:
            image = _picture(sources[which], self.mode)
            if sources[0] == sources[1]:
                middle = image.width // 2
                image = image.crop((which * middle, 0, (which + 1) * middle, image.height))
            return sources[which], image

        chosen = (self.sources[index] for index in indices.tolist())
        return _as_images(map(half, chosen), (len(indices), *self.shape[1:]), self.resizes)


class _FirstOfPairs(ImageSource):
    def __init__(self, pairs: ImagePairs):
        self.pairs, self.shape = pairs, pairs.shape

    def read(self, indices: Tensor) -> Tensor:
        return self.pairs.read_half(indices, 0)


class _Rearranged(ImageSource):
    """The images of a source in another order, in which one may come more than once."""

    def __init__(self, images: ImageSource, order: Tensor):
        self.images, self.order, self.shape = images, order, (len(order), *images.shape[1:])

    def read(self, indices: Tensor) -> Tensor:
        return self.images[self.order[indices]]


class UnpairedImages(_Rearranged):
    """Pictures of two domains that do not belong together: an image is one of the folder ``A``, and its condition
    "unpaired" one of ``B`` (or ``trainA`` and ``trainB``), in an order that has nothing to do with its name. There are
    as many as in the fuller folder; those of the other come again. The arguments and errors are :class:`ImageFolder`'s.
    """

    def __init__(
        self, folder: Path | str, size: int | None = None, channels: int = 3, on_error: str = "stop",
        verify: bool = True,
    ):  # fmt: skip
        domains = _domains(folder)
        if domains is None:
            names = " or ".join(" and ".join(pair) for pair in DOMAINS)
            raise FileNotFoundError(f"{folder} has no folders {names}: unpaired pictures lie in one for each domain")
        first, second = (ImageFolder(domain, size, channels, on_error, verify) for domain in domains)
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(
                f"the pictures of {domains[0]} are {first.shape[2]}x{first.shape[2]}, those of {domains[1]} "
                f"{second.shape[2]}x{second.shape[2]}; pass size=... (--size N --resize) to make them one size"
            )
        number = max(len(first), len(second))
        super().__init__(first, torch.arange(number) % len(first))
        self.second = _Rearranged(
            second, torch.randperm(number, generator=torch.Generator().manual_seed(0)) % len(second)
        )

    @property
    def conditions(self) -> dict[str, ImageSource]:
        return {"unpaired": self.second}


def _domains(folder: Path | str) -> tuple[Path, Path] | None:
    """The folders of the two domains of ``folder``, if it has such."""
    _check_folder(folder)
    for names in DOMAINS:
        there = [name for name in names if (Path(folder) / name).is_dir()]
        if len(there) == 1:
            missing = names[1 - names.index(there[0])]
            raise FileNotFoundError(f"{folder} has a folder {there[0]} and no {missing}: two domains need both")
        if there:
            return Path(folder) / names[0], Path(folder) / names[1]
    return None


def _pairs(folder: Path | str) -> list[tuple[Path, Path | None, Path | None]]:
    """Of each pair of pictures: a path to name it by, and where its first and its second are (None: nowhere)."""
    domains = _domains(folder)
    if domains is None:
        return [(path, path, path) for path in _pictures(folder)]
    named: list[dict[Path, Path]] = [{}, {}]
    for domain, names in zip(domains, named):
        for path in _pictures(domain):
            name = path.relative_to(domain).with_suffix("")
            if name in names:
                raise BrokenFile(f"{names[name]} and {path} have one name: which of them is of a pair is not known")
            names[name] = path
    first, second = named
    return [(first.get(name) or second[name], first.get(name), second.get(name)) for name in sorted({*first, *second})]


# ------------------------------------------------------------------------------------------------------------
# What all of them share


def _checked(size: int | None, channels: int, on_error: str) -> tuple[int | None, bool]:
    """The size, and whether broken files are left out."""
    if whole("channels", channels, 1) not in MODES:
        raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {channels}")
    return None if size is None else whole("size", size, least=1), _skips(on_error)


def _check_folder(folder: Path | str) -> None:
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder must be a path, got {shown(folder)}")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")


class ZipMember(PurePosixPath):
    """A file in a zip file: its path is that of the zip file, and its own in there."""

    archive: zipfile.ZipFile
    name_in_archive: str

    @classmethod
    def of(cls, archive: zipfile.ZipFile, name: str) -> "ZipMember":
        member = cls(str(archive.filename), name)
        member.archive, member.name_in_archive = archive, name
        return member

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.archive.read(self.name_in_archive))


def _below(folder: Path | str) -> tuple[Any, list[Any]]:
    """A folder or a zip file, and the pictures below it. Of a zip file that holds one folder it is that folder."""
    if not isinstance(folder, str | Path) or not Path(folder).is_file():
        return Path(folder) if isinstance(folder, str) else folder, _pictures(folder)
    try:
        archive = zipfile.ZipFile(folder)
    except zipfile.BadZipFile as error:
        raise BrokenFile(f"{folder} is neither a folder nor a zip file of pictures: {error}") from error
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]  # where macOS keeps its notes
    found = sorted(ZipMember.of(archive, name) for name in names if name.lower().endswith(SUFFIXES))
    if not found:
        raise FileNotFoundError(f"there are no pictures ({', '.join(SUFFIXES)}) in {folder}")
    top = PurePosixPath(str(folder))
    while len({path.relative_to(top).parts[0] for path in found}) == 1 and len(found[0].relative_to(top).parts) > 1:
        top = top / found[0].relative_to(top).parts[0]
    return top, found


def _is_grey(path: Path) -> bool:
    """Whether a picture has no colours, by its header; a broken one has none to lose."""
    try:
        with _opened(path) as image:
            return image.mode in ("1", "L", "LA", "La", "I", *WIDE)
    except BrokenFile:
        return True


def _pictures(folder: Path | str) -> list[Path]:
    """The pictures below a folder, in the order of their paths."""
    _check_folder(folder)
    found = sorted(path for path in _files(Path(folder)) if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"there are no pictures ({', '.join(SUFFIXES)}) below {folder}")
    return found


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files below a folder, and below the folders that links in it lead to: data sets are often put together of
    links. A link that leads nowhere is among them, as a file that cannot be read; one to a folder above it is not
    followed."""
    here = folder.resolve()
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(folder / entry.name, (*above, here))
            elif entry.is_file() or entry.is_symlink():
                yield folder / entry.name


def _square(path: Path, extent: tuple[int, int], side: int | None, before: list[Path]) -> int:
    """The side of a picture; a BrokenFile unless it is a square, of the ``side`` of those before it."""
    width, height = extent
    if width != height or side not in (None, width):
        expected = f"{side}x{side}, as {before[0]} is" if side else "a square"
        raise BrokenFile(
            f"{path} is {width}x{height}, not {expected}; pass size=... (--size N --resize) to crop every picture to "
            "its centre square and resize it"
        )
    return width


def _as_images(pictures: Iterable[tuple[Path, "Pillow.Image"]], shape: tuple[int, ...], resizes: bool) -> Tensor:
    """Pictures as [n, channels, size, size] in [-1, 1]: their centre squares, where they are resized."""
    _, channels, size, _ = shape
    rows = []
    for path, image in pictures:
        if resizes:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size), BICUBIC)
        elif image.size != (size, size):
            raise BrokenFile(f"{path} is not {size}x{size} any more")
        values = np.asarray(image, np.float32)
        values = values[:, :, None] if values.ndim == 2 else values
        rows.append(np.broadcast_to(values, (size, size, channels)))
    pixels = np.stack(rows) if rows else np.empty((0, size, size, channels), np.float32)
    # Cubic interpolation overshoots, which only pictures of 8 bits cut off by themselves.
    return scaled(torch.from_numpy(pixels).clamp_(0.0, 255.0).permute(0, 3, 1, 2)).contiguous()


def read_picture(path: Path | str, size: int, channels: int = 3) -> Tensor:
    """One picture as [1, channels, size, size] in [-1, 1]: its centre square, resized. Raises ``BrokenFile``."""
    size, _ = whole("read_picture: size", size, least=1), _checked(None, channels, "stop")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    picture = _picture(Path(path), MODES[channels])
    return _as_images([(Path(path), picture)], (1, channels, size, size), resizes=True)


def _size(path: Path) -> tuple[int, int]:
    """Width and height as its header has them."""
    Image = _pillow("Image").Image

    with _opened(path) as image:
        width, height = image.size
        # PNG's own getexif would decode the picture. Pillow turns TIFF files, and their size, by itself.
        turned = image.format != "TIFF" and Image.getexif(image).get(ORIENTATION) in SIDEWAYS
        return (height, width) if turned else (width, height)


def _picture(path: Path, mode: str) -> "Pillow.Image":
    """A picture as PIL's image, upright: in ``mode``, or grey in floats from 0 to 255 where it has more bits."""
    ImageOps = _pillow("ImageOps")

    with _opened(path) as image:
        # A second picture in a camera's .jpg is a preview or a view from beside; the first is the picture.
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
            raise ValueError(f"it holds {frames} pictures: make it a file for each")
        if reason := _unreadable(image):
            raise ValueError(reason)
        if image.mode in WIDE or _wide_as_integers(image):
            return _wide(image)
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("LA" if image.mode == "La" else "RGBA")
            if np.asarray(image.getchannel("A")).min() < 255:
                raise ValueError("parts of it are transparent: put it on a background, and save it without")
        return image.convert("RGB").convert(mode)


# Pillow's names: of the formats of SUFFIXES, whatever a file is called (others run programs, or hold no pictures); of
# pixels of 8 bits, which it converts rightly; and of such with more.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
NARROW = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
WIDE = ("I;16", "I;16B", "I;16L", "I;16N")

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # of EXIF: in these, what is stored as a row is a column
BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF's tags
WHITE_IS_ZERO, APART, SIGNED = 0, 2, 2  # and values of the last three


def _pillow(module: str) -> ModuleType:
    return extras.load(f"PIL.{module}", "a folder of pictures")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """PIL's image of a file. What goes wrong with it within the block is a ``BrokenFile`` with the file's name."""
    Image = _pillow("Image")

    Image.init()
    try:
        # A file that is open already is not mapped into memory: a map is of the wrong shape where a TIFF file lies on
        # its side, and ends the process where a file becomes shorter.
        with path.open("rb") as file, Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
            yield image
    except Image.UnidentifiedImageError as error:
        raise BrokenFile(f"{path}: not a picture of {', '.join(FORMATS)}, or damaged") from error
    except Exception as error:  # decoders raise anything of damaged files
        raise BrokenFile(f"{path}: {error or type(error).__name__}") from error


def _tag(image: Any, number: int) -> int | None:
    """The value of a TIFF file's tag, of its first channel where each has one."""
    value = image.tag_v2.get(number) if image.format == "TIFF" else None
    return value[0] if isinstance(value, tuple) else value


def _unreadable(image: Any) -> str | None:
    """Why nobody can say what is black and what is white in a picture; None where that is known."""
    unknown = (
        "of which nobody says what is black and what is white: save it with 8 bits, or with 16 bits without a sign"
    )
    if image.mode == "F":
        return f"its pixels are floats, {unknown}"
    if _tag(image, SAMPLE_FORMAT) == SIGNED:
        return f"its pixels are integers with a sign, {unknown}"
    if image.mode == "I" and not _wide_as_integers(image):
        return f"its pixels are integers of 32 bits, {unknown}"
    if image.mode not in (*NARROW, *WIDE) and not _wide_as_integers(image):
        return f"its pixels are of the kind {image.mode!r}, which is not read: save it as RGB or grey"
    if _tag(image, PLANAR) == APART and (_tag(image, BITS) or 8) > 8:
        return "its channels of more than 8 bits lie apart, which Pillow does not read: save it with them interleaved"
    if image.mode in WIDE and "transparency" in image.info:
        return "parts of it are transparent: put it on a background, and save it without"
    return None


def _wide_as_integers(image: "Pillow.Image") -> bool:
    """Whether these are 16 bits, which Pillow holds in 32 for these formats."""
    return image.mode == "I" and image.format in ("PNG", "PPM")


def _wide(image: Any) -> "Pillow.Image":
    """A grey picture of more than 8 bits as floats from 0 to 255, upright."""
    Image, ImageOps = _pillow("Image"), _pillow("ImageOps")

    largest = 2.0 ** (_tag(image, BITS) or 16) - 1.0
    values = np.asarray(ImageOps.exif_transpose(image), np.float64) / largest
    if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 1.0 - values
    return Image.fromarray((255.0 * values).astype(np.float32))


def check_on_error(on_error: str) -> None:
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {shown(on_error)}")


def _skips(on_error: str) -> bool:
    check_on_error(on_error)
    return on_error == "skip"


@contextmanager
def _skipping(skip: bool) -> Iterator[None]:
    """Lets a broken file stop the loading, or logs it."""
    try:
        yield
    except BrokenFile as error:
        if not skip:
            raise BrokenFile(f"{error} (on_error='skip', --on-error skip, leaves such files out)") from error
        log.warning("left out: %s", error)


def scaled(pixels: Tensor) -> Tensor:
    """0..255 → float32 in [−1, 1]."""
    return (pixels / 127.5).sub_(1.0)


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10 as its authors distribute it: pickles of {b"data": uint8 [10000, 3072], b"labels": list of 10000}

CIFAR10_FILES = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR10_CLASSES = 10


def cifar10(folder: Path | str, on_error: str = "stop") -> tuple[Tensor, Tensor]:
    """CIFAR-10's 50,000 training images from its python files: [N, 3, 32, 32] in [−1, 1], and labels [N].

    ``folder`` is the ``cifar-10-batches-py`` of the archive. Raises ``BrokenFile`` with the name of a file that is
    missing, damaged or of another format, or with on_error="skip" logs it and goes on without.
    """
    skip = _skips(on_error)
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder must be a path, got {shown(folder)}")
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
        content = read_batch(path.read_bytes())
        pixels = content[b"data"]
        labels = content[b"labels"]
    except FileNotFoundError as error:
        raise BrokenFile(f"{path}: there is no such file") from error
    except OSError as error:
        raise BrokenFile(f"{path}: {error.strerror}") from error
    except KeyError as error:
        raise BrokenFile(f"{path}: not a python file of CIFAR-10: it has no {error.args[0].decode()}") from error
    except ValueError as error:
        raise BrokenFile(f"{path}: not a python file of CIFAR-10, or damaged: {error}") from error
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (3072,) or len(pixels) == 0:
        came = f"uint8 {pixels.shape}" if isinstance(pixels, np.ndarray) else f"a {type(pixels).__name__}"
        raise BrokenFile(f"{path}: expected data of uint8 [N, 3072], got {came}")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels) or len(labels) != len(pixels):
        raise BrokenFile(f"{path}: expected a list of {len(pixels)} labels that are integers")
    if wrong := [label for label in labels if not 0 <= label < CIFAR10_CLASSES]:
        raise BrokenFile(f"{path}: labels must be from 0 to {CIFAR10_CLASSES - 1}, got {shown(wrong[0])}")
    return torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.tensor(labels)
