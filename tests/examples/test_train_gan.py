"""The example runs as it says, and both sets of layers give the same losses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


def test_both_sets_of_layers_train_alike(monkeypatch):
    """In double precision, where rounding cannot hide a mistake."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import train_gan

    images = train_gan.data.load("mnist5k")[:64].double()
    monkeypatch.setattr(train_gan.data, "load", lambda name: images)
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = (train_gan.train(3, 4, 8, ours)[1] for ours in (True, False))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


def test_the_command(tmp_path):
    out = tmp_path / "digits.png"
    command = [
        sys.executable,
        str(FOLDER / "train_gan.py"),
        "--steps",
        "1",
        "--width",
        "4",
        "--batch-size",
        "8",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step 1 of 1" in done.stdout and out.read_bytes().startswith(b"\x89PNG")
