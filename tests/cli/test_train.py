"""gankern train as a user meets it: what it prints, its exit codes, and what Ctrl-C leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from gankern.cli.sample import sample
from gankern.cli.train import train
from gankern.training import CHECKPOINT, checkpoint

app = typer.Typer()
app.command()(train)
app.command()(sample)

SMALL = ["--data", "digits", "--width", "4", "--latent", "8", "--batch-size", "16", "--threads", "1"]


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def says(result, *words):
    """One clear line on stderr, a non-zero exit code and no traceback."""
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    return True


def test_train_then_resume(tmp_path):
    out = tmp_path / "run"
    result = run("sn_dcgan", *SMALL, "--out", out, "--steps", 3, "--compare")
    assert result.exit_code == 0, result.output
    for word in ("whole step", "torch / gankern", "largest difference of a loss", "first 50 steps"):
        assert word in result.output
    for name in ("checkpoint.pt", "samples.png", "losses.png", "log.csv", "record.json"):
        assert (out / name).is_file()

    result = run("sn_dcgan", "--out", out, "--resume", "--steps", 5)
    assert result.exit_code == 0, result.output
    assert checkpoint.load(out / CHECKPOINT).step == 5


def test_resized_data(tmp_path):
    result = run("sn_dcgan", *SMALL, "--size", 16, "--resize", "--out", tmp_path / "run", "--steps", 2)
    assert result.exit_code == 0, result.output
    result = run("sn_dcgan", "--data", "digits", "--out", tmp_path / "run", "--resume", "--steps", 3)
    assert result.exit_code == 0, result.output


def test_errors(tmp_path):
    out = ["--out", tmp_path / "run"]
    assert says(run("sndcgan", *SMALL, *out), "unknown model 'sndcgan'", "did you mean sn_dcgan")
    assert says(run("dcgan", "--data", "digit", *out), "unknown data 'digit'", "did you mean digits")
    assert says(run("dcgan", *SMALL, "--loss", "hing", *out), "unknown loss 'hing'", "did you mean hinge")
    assert says(run("dcgan", *SMALL, "--layers", "tourch", *out), "did you mean torch")
    assert says(run("dcgan", *SMALL, "--size", 32, *out), "pass --size 8, or --resize")
    assert says(run("dcgan", *SMALL, "--size", 12, "--resize", *out), "power of two", "8 and 16")
    assert says(run("dcgan", *SMALL, "--batch-size", 5000, *out), "batch_size must be between 1 and the 1797")
    assert says(run("dcgan", *SMALL, "--lr", "-1", *out), "lr must be a positive number")
    assert says(run("dcgan", *SMALL, "--device", "cuda:77", *out), "cuda:77")
    assert says(run("dcgan", "--resume", *out), "there is no checkpoint")
    assert not (tmp_path / "run").exists()


def test_output_folder_in_use(tmp_path):
    out = ["--out", tmp_path / "run"]
    assert run("sn_dcgan", *SMALL, *out, "--steps", 1).exit_code == 0
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    assert says(run("sn_dcgan", *SMALL, *out, "--steps", 1), "in use", "--resume", "another --out")
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    assert says(run("dcgan", "--resume", *out), "model=sn_dcgan, not model=dcgan")
    assert says(run("sn_dcgan", "--resume", "--lr", "0.1", *out), "lr=0.001, not lr=0.1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_valid_checkpoint(tmp_path, number):
    out = tmp_path / "run"
    command = "import typer; from gankern.cli.train import train; typer.run(train)"
    arguments = ["sn_dcgan", *SMALL, "--out", str(out), "--steps", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    deadline = time.monotonic() + 60
    while not (out / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"gankern train sn_dcgan --resume --out {out}" in output
    assert "Traceback" not in output

    step = checkpoint.load(out / CHECKPOINT).step
    assert step > 0
    result = run("sn_dcgan", "--resume", "--out", out, "--steps", step + 2)
    assert result.exit_code == 0, result.output


def test_killed_at_any_moment_it_resumes(tmp_path):
    """SIGKILL gives no chance to tidy up: the checkpoint must be whole because it is always whole."""
    out = tmp_path / "run"
    command = "import typer; from gankern.cli.train import train; typer.run(train)"
    arguments = ["sn_dcgan", *SMALL, "--out", str(out), "--steps", "1000000", "--checkpoint-every", "1"]
    process = subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "samples" / "step-000003.png").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    step = checkpoint.load(out / CHECKPOINT).step
    assert step >= 3
    result = run("sn_dcgan", "--resume", "--out", out, "--steps", step + 2)
    assert result.exit_code == 0, result.output
    assert (out / "log.csv").read_text().count("\n") == step + 3  # the header and every step once
