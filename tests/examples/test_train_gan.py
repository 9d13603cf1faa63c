"""The example runs as it says, and both sets of layers give the same losses."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def test_both_sets_of_layers_train_alike(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import train_gan

    ours, theirs = (train_gan.train(3, 4, 8, ours)[1] for ours in (True, False))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


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
