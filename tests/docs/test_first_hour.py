"""The first ten minutes, as docs/quickstart.md has them: every command of its first page runs, one after the other."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import gankern
from gankern import data, training
from gankern.cli import app
from gankern.training import pictures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder after it, and (command, result) of each line."""
    for package in ("onnxruntime", "onnxscript", "torchmetrics"):
        pytest.importorskip(package)
    place = tmp_path_factory.mktemp("first_hour")
    images, labels = data.load("digits", 16), data.labels("digits")
    for i in range(60):
        path = place / "pictures" / f"digit {labels[i]}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures.pixels(images[i : i + 1])[0, :, :, 0]).save(path)
    (block,) = (part for part in PAGE.split("```") if part.startswith("\ngankern info\n"))
    results: list = []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in block.strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "gankern"
            if words[1] == "verify":  # of this machine's kernels, not of Triton's interpreter, which the tests use
                done = subprocess.run([sys.executable, "-m", *words], env=plain, capture_output=True, text=True)
                results.append((line, SimpleNamespace(exit_code=done.returncode, output=done.stdout + done.stderr)))
                continue
            results.append((line, CliRunner().invoke(app, words[1:], env={"COLUMNS": "160"})))
    yield place, results
    shutil.rmtree(place)


def test_every_command_runs(ran):
    place, results = ran
    failed = [(line, result.output) for line, result in results if result.exit_code]
    unmade = "nothing to verify" in "".join(output for _, output in failed)  # without the native library
    assert not failed or (unmade and len(failed) == 1), failed
    commands = {line.split()[1] for line, _ in results}
    assert commands == {"info", "verify", "train", "sample", "evaluate", "export"}


def test_what_it_leaves(ran):
    place, results = ran
    assert (place / "grid.png").stat().st_size > 1000 and len(list((place / "fakes").iterdir())) == 32
    config, _ = training.find_run(place / "runs" / "mine")
    assert (config.num_classes, config.channels, config.size) == (10, 1, 16)  # labels from folders, grey pictures
    (evaluation,) = (result.output for line, result in results if "evaluate" in line)
    assert "sliced Wasserstein distance" in evaluation and "FID, own classifier" in evaluation


def test_onnxruntime_gives_the_same_images(ran):
    import onnxruntime

    place, _ = ran
    session = onnxruntime.InferenceSession(place / "runs" / "mine" / "generator.onnx")
    latents, labels = torch.randn(7, 128), torch.arange(7)
    (found,) = session.run(None, {"latents": latents.numpy(), "labels": labels.numpy()})
    expected = gankern.load_generator(place / "runs" / "mine")(latents, labels).detach().numpy()
    assert np.abs(found - expected).max() < 1e-5 + 1e-4 * np.abs(expected).max()
