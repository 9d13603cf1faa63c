"""Recordings as one HTML file that asks for nothing else: the numbers in it, and a script that plays them."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gankern import __version__
from gankern.core import extras
from gankern.core.files import write_bytes
from gankern.theory.play.recording import FIGURES, LOSSES, REACH, Recording

# Places are stored in steps of 2·SPAN/4095 (a sixth of a pixel), slopes as a direction and the logarithm of a length.
SPAN, LEVELS = 1.5 * REACH, 4095
SHORTEST, LONGEST = 1e-5, 1e2
TITLES = {"ring": "ring", "line": "line", "two_blobs": "two blobs", "8gaussians": "eight Gaussians"}


def places(values: Tensor) -> np.ndarray:
    """Coordinates as uint16, those outside the span at its edge."""
    scaled = (values.double().clamp(-SPAN, SPAN) + SPAN) / (2 * SPAN) * LEVELS
    return scaled.round().numpy().astype(np.uint16)


def _bytes(values: Tensor) -> np.ndarray:
    """[0, 1] as uint8."""
    return (values.double().clamp(0, 1) * 255).round().numpy().astype(np.uint8)


def shades(recording: Recording) -> Tensor:
    """D's map in [0, 1]: a probability; least squares' target, clipped; a critic from its lowest to its highest value
    at that moment, since only differences mean something."""
    heat = recording.heat
    if recording.loss in ("minimax", "non_saturating"):
        return heat.sigmoid()
    if recording.loss == "least_squares":
        return heat.clamp(0, 1)
    low, high = heat.amin((1, 2), True), heat.amax((1, 2), True)
    return (heat - low) / (high - low).clamp(min=1e-12)


def _differences(values: np.ndarray) -> bytes:
    """Moments [F, ...] as differences to the moment before, the low bytes before the high ones: small numbers pack."""
    moments = values.reshape(len(values), -1)
    changed = np.diff(moments, axis=0, prepend=np.zeros_like(moments[:1]))  # modulo the type's range
    if changed.dtype == np.uint8:
        return changed.tobytes()
    # Zigzag: a small step back is a small number too.
    signed = changed.astype(np.int16)
    folded = ((signed << 1) ^ (signed >> 15)).astype(np.uint16)
    return (folded & 255).astype(np.uint8).tobytes() + (folded >> 8).astype(np.uint8).tobytes()


def packed(recording: Recording) -> tuple[dict[str, Any], bytes]:
    """What the script unpacks: names, numbers, and bytes in the order points, manifold, heat, directions, lengths."""
    length = recording.arrows.double().norm(dim=2)
    logarithm = (length.clamp(SHORTEST, LONGEST) / SHORTEST).log() / math.log(LONGEST / SHORTEST)
    angle = torch.atan2(recording.arrows[..., 1], recording.arrows[..., 0]).double() / (2 * math.pi) % 1.0
    content = b"".join(
        (
            _differences(places(recording.points)),
            _differences(places(recording.manifold)),
            _differences(_bytes(shades(recording))),
            _differences((angle * 256).round().numpy().astype(np.int64).astype(np.uint8)),
            _differences(_bytes(logarithm)),
        )
    )
    head = {
        "loss": recording.loss,
        "title": LOSSES[recording.loss][0],
        "steps": recording.steps.tolist(),
        "figures": {name: [round(v, 5) for v in column] for name, column in zip(FIGURES, recording.figures.T.tolist())},
    }
    return head, content


def write_page(
    path: Path, runs: Mapping[str, Sequence[Recording]], true: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> int:
    """Writes the page of ``runs``, data set → a recording for each loss, beside ``true`` points [N, 2]; its bytes.

    Raises:
        ImportError: there is no jinja2. OSError: the file cannot be written.
    """
    jinja2 = extras.load("jinja2", "gankern play", "report")
    content, sets = [], []
    for name, recordings in runs.items():
        heads = []
        for recording in recordings:
            head, body = packed(recording)
            heads.append(head)
            content.append(body)
        shown = places(true[name])
        content.append(shown.astype("<u2").tobytes())
        sets.append({"name": name, "title": TITLES.get(name, name), "points": len(shown), "runs": heads})
    first = next(iter(runs.values()))[0]
    header = {
        "version": __version__,
        "span": SPAN,
        "levels": LEVELS,
        "reach": REACH,
        "shortest": SHORTEST,
        "longest": LONGEST,
        "fakes": first.points.shape[1],
        "corners": first.manifold.shape[1],
        "heat": first.heat.shape[1],
        "settings": dict(settings),
        "sets": sets,
    }
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("gankern.theory.play", "."), jinja2.PackageLoader("gankern.measure.report", ".")]
        ),
        autoescape=jinja2.select_autoescape(["html"]),
    )
    text = environment.get_template("play.html").render(
        header=json.dumps(header, separators=(",", ":")).replace("<", "\\u003c"),
        content=base64.b64encode(zlib.compress(b"".join(content), 9)).decode(),
        settings=settings,
        version=__version__,
    )
    encoded = text.encode()
    write_bytes(path, encoded)
    return len(encoded)
