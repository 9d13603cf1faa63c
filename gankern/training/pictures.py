"""The pictures a run leaves: samples, loss curves, figures of merit, an animation. No display is needed."""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import shown
from gankern.core.files import check_can_write, write_bytes
from gankern.games import Picture
from gankern.training.trainer import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# What a picture can be written as, by its name, and an animation.
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
ANIMATIONS = {".gif": "GIF", ".png": "PNG", ".webp": "WEBP"}

LABELS = {
    "fid": "FID",
    "kid": "KID",
    "inception_score": "Inception score",
    "kid_std": "KID's standard deviation",
    "inception_score_std": "Inception score's standard deviation",
    "swd": "sliced Wasserstein distance x 1000",
    "wasserstein_estimate": "critic's Wasserstein estimate",
    "modes_covered": "modes covered",
    "high_quality": "share within 3 std of a mode",
    "sliced_wasserstein": "sliced Wasserstein distance",
}


OWN = {"_own_classifier": "own classifier", "_own_features": "own features"}  # whose figures compare with no paper's


def label(name: str) -> str:
    """What a figure of merit is called in tables and pictures.

    >>> label("fid"), label("fid_own_classifier"), label("purity")
    ('FID', 'FID, own classifier', 'purity')
    """
    for ending, words in OWN.items():
        if name.endswith(ending):
            return f"{label(name.removesuffix(ending))}, {words}"
    return LABELS.get(name, name)


def format_of(path: Path | str, formats: dict[str, str] = FORMATS) -> str:
    """The format of a picture's name; a ValueError with those there are."""
    path = Path(path)
    try:
        return formats[path.suffix.lower()]
    except KeyError:
        ending = f"with {path.suffix}" if path.suffix else "without an ending"
        raise ValueError(f"{path}: a picture's name ends with {', '.join(formats)}, this one {ending}") from None


def check_can_draw() -> None:
    """Raises the ImportError that the first picture would, before long work."""
    _matplotlib("figure")


def _matplotlib(module: str) -> ModuleType:
    return extras.load(f"matplotlib.{module}", "a picture")


def _figure(width: float, height: float) -> "Figure":
    return _matplotlib("figure").Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path | str) -> None:
    """A figure as a file, which is whole or not there."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format=format_of(path))
    write_bytes(path, buffer.getvalue())


def grid(images: Tensor, columns: int = 8, gap: int = 2) -> np.ndarray:
    """Images [N, C, H, W] in [−1, 1], C 1 or 3, row by row as one picture [height, width, 3] in [0, 1].

    Cells that are left over, and the gaps of ``gap`` pixels, are white.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        raise ValueError(f"a grid is of images [N, C, H, W], got {shown(images)}")
    number, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, these images have {channels}")
    columns = min(columns, number)
    rows = -(-number // columns)
    picture = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), dtype=np.float32)
    pixels = (images.detach().float().clamp(-1, 1) * 0.5 + 0.5).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def pixels(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C], rounded; what lies outside is cut off.

    >>> import torch
    >>> pixels(torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 1, 4)).ravel().tolist()
    [0, 0, 128, 255]
    """
    return (images.detach().float().clamp(-1.0, 1.0) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def check_each(path: Path | str) -> None:
    """Raises where :func:`save_each` could not write: before long work."""
    path = Path(path)
    if path.suffix == ".npz":
        check_can_write(path)
        return
    extras.load("PIL.Image", "pictures one by one")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: pictures one by one go into a folder, or arrays into a FILE.npz")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: name a new folder, so that it has these samples alone")


def save_each(path: Path | str, batches: Iterable[Tensor], labels: Tensor | None = None) -> None:
    """Samples one by one: images as PNG files in a folder, or, where the path ends with .npz, all as arrays.

    ``arr_0`` is uint8 [N, H, W, C] (of points float32 [N, 2]), and ``arr_1`` the labels [N], as the usual programs for
    FID take them.
    """
    path = Path(path)
    check_each(path)
    if path.suffix == ".npz":
        arrays = [np.concatenate([pixels(b) if b.ndim == 4 else b.float().numpy() for b in batches])]
        arrays += [] if labels is None else [labels.numpy()]
        buffer = io.BytesIO()
        np.savez(buffer, *arrays)
        write_bytes(path, buffer.getvalue())
        return
    Image = extras.load("PIL.Image", "pictures one by one")
    path.mkdir(parents=True, exist_ok=True)
    number = 0
    for batch in batches:
        if batch.ndim != 4 or batch.shape[1] not in (1, 3):
            raise ValueError(f"pictures are images of 1 or 3 channels, got {shown(batch)}: name a FILE.npz for others")
        for image in pixels(batch):
            # Not as one file is written: to wait for the disk ten thousand times takes minutes.
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(path / f"{number:06}.png")
            number += 1


def save_grid(path: Path | str, images: Tensor, columns: int = 8) -> None:
    """One grid as a PNG, each pixel of an image doubled until a grid of 8×8 fills some 500 pixels."""
    scale = max(1, 64 // images.shape[-1])
    buffer = io.BytesIO()
    _matplotlib("image").imsave(
        buffer, grid(images, columns).repeat(scale, axis=0).repeat(scale, axis=1), format=format_of(path)
    )
    write_bytes(path, buffer.getvalue())


def save_samples(path: Path | str, drawn: dict[str, Picture], title: str = "") -> None:
    """One titled grid of images, or scatter plot of points, for each entry, from left to right, under one title.

    Every pixel of an image is a square of whole pixels of the picture. Points [N, 2] are drawn with the true modes
    [K, 2] behind them, if there are any.
    """
    if all(picture.batch.ndim == 4 for picture in drawn.values()):
        _save_grids(path, drawn, title)
        return
    figure = _figure(6 * len(drawn), 6.4)
    for axes, (name, picture) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        if picture.batch.ndim == 2:
            _scatter(axes, picture.batch, picture.modes)
        else:
            axes.imshow(grid(picture.batch, picture.columns), interpolation="nearest")
            axes.axis("off")
        axes.set_title(name)
    figure.suptitle(title)
    _save(figure, path)


SMALLEST, LINE, LETTER = 384, 24, 9  # of a grid's width, a line of text, and a letter, in pixels


def _save_grids(path: Path | str, drawn: dict[str, Picture], title: str) -> None:
    """Grids from left to right, pixel by pixel, with a line above each and names beside rows."""
    blocks = []
    for picture in drawn.values():
        small = grid(picture.batch, picture.columns)
        scale = max(1, round(SMALLEST / small.shape[1]))
        margin = LETTER * max(map(len, picture.rows), default=0) + (LETTER if picture.rows else 0)
        blocks.append((small.repeat(scale, 0).repeat(scale, 1), margin, scale * (picture.batch.shape[2] + 2), scale))
    height = max(len(pixels) for pixels, *_ in blocks) + (2 if title else 1) * LINE
    width = sum(pixels.shape[1] + margin for pixels, margin, *_ in blocks) + LETTER * (len(blocks) - 1)
    width = max(width, LETTER * len(title))
    figure = _matplotlib("figure").Figure(figsize=(width / 100, height / 100), dpi=100)

    def write(text: str, x: float, y: float, **how: Any) -> None:
        figure.text(x / width, 1.0 - y / height, text, fontsize=10, va="center", **how)

    if title:
        write(title, width / 2, LINE / 2, ha="center", weight="bold")
    top, left = (2 if title else 1) * LINE, 0
    for (name, picture), (pixels, margin, row, scale) in zip(drawn.items(), blocks):
        left += margin
        figure.figimage(pixels, left, height - top - len(pixels), origin="upper")
        write(name, left + pixels.shape[1] / 2, top - LINE / 2, ha="center")
        for i, text in enumerate(picture.rows):
            write(text, left - LETTER / 2, top + 2 * scale + (i + 0.5) * row - scale, ha="right")
        left += pixels.shape[1] + LETTER
    _save(figure, path)


def _scatter(axes: Any, points: Tensor, modes: Tensor | None) -> None:
    if modes is not None:
        axes.scatter(*modes.T.numpy(), s=160, facecolors="none", edgecolors="tab:red", linewidths=1, label="true modes")
    axes.scatter(*points.detach().T.numpy(), s=3, alpha=0.4, linewidths=0, color="tab:blue", label="samples")
    axes.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    axes.legend(loc="upper right")


def save_loss_curves(path: Path | str, steps: dict[str, list[Step]], titles: Mapping[str, str]) -> None:
    """The players' losses against the step, every side in the same axes; ``titles`` of the players, by name."""
    figure = _figure(10, 3 * len(titles))
    rows = figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (player, title) in zip(rows, titles.items(), strict=True):
        for (side, results), style in zip(steps.items(), ("-", "--"), strict=False):
            losses = [step.losses[player] for step in results]
            axes.plot(range(1, len(losses) + 1), losses, style, linewidth=0.8, label=side)
        axes.set_ylabel(f"{title} loss")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    axes.set_xlabel("step")
    _save(figure, path)


def save_figure_curves(path: Path | str, figures: Sequence[dict[str, Any]]) -> None:
    """Each figure of merit against the step, every side in the same axes. ``figures`` as a ``Log`` has them."""
    sides = [key for key in figures[-1] if key != "step"]
    names = list(figures[-1][sides[0]])
    figure = _figure(10, 2.4 * len(names))
    for axes, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
        for side, style in zip(sides, ("o-", "s--"), strict=False):
            found = [(row["step"], row[side][name]) for row in figures if name in row[side]]
            axes.plot(*zip(*found, strict=True), style, markersize=3, linewidth=0.8, label=side)
        axes.set_ylabel(label(name), fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    axes.set_xlabel("step")
    _save(figure, path)


def save_animation(path: Path | str, frames: Sequence[Path]) -> int:
    """Pictures as an animated GIF of eight seconds, which stays at the last one for a while; how many pictures it has.

    A picture that cannot be read, as one that was being written when a run was killed, is logged by name and left out.
    """
    Image = extras.load("PIL.Image", "an animation")
    form = format_of(path, ANIMATIONS)
    pictures: list[Any] = []
    for frame in frames:
        try:
            with Image.open(frame, formats=["PNG"]) as picture:
                shown_at = picture.convert("RGB")
        except Exception as error:  # decoders raise anything of damaged files
            log.warning("left out: %s: %s", frame, str(error).partition("\n")[0])
            continue
        # All frames of an animation are of the first one's size.
        pictures.append(shown_at if not pictures else shown_at.resize(pictures[0].size))
    if not pictures:
        raise ValueError(f"none of {len(frames)} pictures can be read")
    pictures = [picture.quantize(64) for picture in pictures]
    each = max(40, int(8000 / len(pictures)))
    buffer = io.BytesIO()
    durations = [each] * (len(pictures) - 1) + [2000]
    pictures[0].save(buffer, form, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_bytes(path, buffer.getvalue())
    return len(pictures)
