"""Files with bytes that were changed, cut off or put in: read rightly, or refused in one sentence; never a crash, and
never code of the file's."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
from drawing import Draw, Problem
from PIL import Image

from gankern import data
from gankern.training import checkpoint


def _cifar(draw: Draw, folder: Path) -> Path:
    content = {
        b"data": np.frombuffer(draw.randbytes(4 * 3072), dtype=np.uint8).reshape(4, 3072), b"labels": [0, 1, 2, 3]
    }  # fmt: skip
    path = folder / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=draw.choice((2, 4))))
    return path


def _idx(draw: Draw, folder: Path) -> Path:
    content = struct.pack(">IIII", 0x803, 3, 4, 4) + draw.randbytes(48)
    zipped = draw.random() < 0.5
    path = folder / ("train-images-idx3-ubyte.gz" if zipped else "train-images-idx3-ubyte")
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


def _image(draw: Draw, folder: Path) -> Path:
    buffer = io.BytesIO()
    picture = Image.frombytes("RGB", (8, 8), draw.randbytes(192))
    kind = draw.choice(("png", "jpeg", "bmp", "gif"))
    picture.save(buffer, kind)
    path = folder / f"a.{'jpg' if kind == 'jpeg' else kind}"
    path.write_bytes(buffer.getvalue())
    return path


def _array(draw: Draw, folder: Path) -> Path:
    path = folder / "images.npy"
    np.save(path, np.frombuffer(draw.randbytes(4 * 48), dtype=np.uint8).reshape(4, 4, 4, 3))
    return path


def _checkpoint(draw: Draw, folder: Path) -> Path:
    path = folder / "checkpoint.pt"
    torch.save({"step": 3, "weights": torch.arange(6.0), "name": "x"}, path)
    return path


MADE = (_cifar, _idx, _image, _array, _checkpoint)


def _changed(draw: Draw, content: bytes) -> tuple[bytes, str]:
    how = draw.choice(("nothing", "a bit", "a byte", "cut off", "put in", "doubled", "emptied"))
    at = draw.randrange(len(content))
    if how == "a bit":
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :], f"{how} at {at}"
    if how == "a byte":
        return content[:at] + draw.randbytes(1) + content[at + 1 :], f"{how} at {at}"
    if how == "cut off":
        return content[:at], f"{how} at {at}"
    if how == "put in":
        return content[:at] + draw.randbytes(draw.randint(1, 9)) + content[at:], f"{how} at {at}"
    return {"nothing": content, "doubled": content * 2, "emptied": b""}[how], how


def _read(path: Path) -> None:
    if path.suffix == ".pt":
        checkpoint.load(path)
    else:
        data.load(str(path.parent if path.suffix in (".png", ".jpg", ".bmp", ".gif") else path))


def case(seed: int) -> Problem:
    draw = Draw(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = draw.choice(MADE)(draw, folder)
        content, how = _changed(draw, path.read_bytes())
        path.write_bytes(content)
        try:
            _read(path)
        except (ValueError, OSError, checkpoint.CheckpointError) as error:
            message = str(error)
            if "\n" in message or not message:
                return f"{path.name}, {how}: not one sentence: {message}"
        except Exception as error:
            return f"{path.name}, {how}: {type(error).__name__}: {error}"
        if path.exists() and path.read_bytes() != content:
            return f"{path.name}, {how}: the file was changed"
    return None
