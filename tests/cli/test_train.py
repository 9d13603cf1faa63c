"""gankern train as a user meets it: what it prints, its exit codes, and what Ctrl-C leaves."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from gankern import data, games, training
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
    for word in ("whole step", "torch / gankern", "largest difference of a loss", "first 20 steps"):
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


def test_points_by_one_command(tmp_path):
    options = ["--width", 8, "--steps", 2, "--batch-size", 16, "--threads", 1, "--evaluate-samples", 500]
    result = run("wgan_gp_toy", *options, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    for word in ("wgan_gp_toy on 8gaussians", "modes covered", "share within 3 std", "metrics.png"):
        assert word in result.output
    assert says(
        run("wgan_gp_toy", "--data", "8gausians", *options), "unknown data '8gausians'", "did you mean 8gaussians"
    )
    assert says(run("wgan_gp_toy", "--data", "digits", *options), "is for points", "pass --data 8gaussians or")
    assert says(run("dcgan", "--data", "swiss_roll"), "swiss_roll are points", "pass --data mnist5k or")


def test_configuration_file(tmp_path):
    out = tmp_path / "run"
    mine = tmp_path / "mine.toml"
    mine.write_text('model = "gan"\ndata = "digits"\nsize = 16\nwidth = 10\nsteps = 5\nseed = 3\nthreads = 1\n')
    result = run("--config", mine, "--steps", 1, "--out", out)
    assert result.exit_code == 0, result.output
    config = checkpoint.load(out / CHECKPOINT).config
    assert (config.model, config.size, config.steps, config.seed) == ("gan", 16, 1, 3)  # the command line has its way
    again = run("--config", out / "record.json", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert checkpoint.load(tmp_path / "again" / CHECKPOINT).config == config
    assert run("--resume", "--out", out, "--steps", 2).exit_code == 0
    mine.write_text("stepps = 5\n")
    assert says(run("--config", mine), "unknown option", "did you mean steps")
    assert says(run("--config", tmp_path / "none.toml"), "No such file")
    mine.write_text("steps = 5\n")
    assert says(run("--config", mine), "no MODEL", "sn_dcgan")


def test_everything_that_can_be_trained_is_listed():
    result = run()
    assert result.exit_code == 0
    assert all(name in result.output for name in games.names())


def test_options_of_a_game(tmp_path):
    assert says(run("dcgan", *SMALL, "-o", "code_weight=1"), "dcgan has no options of its own", "code_weight=1")
    assert says(run("infogan", "-o", "code=1"), "unknown option of infogan 'code'", "code_weight")
    assert says(run("infogan", "-o", "code_weight=high"), "code_weight must be a number, got 'high'")
    assert says(run("infogan", "-o", "code_weight"), "--option must be NAME=VALUE")


def test_labels_by_one_option(tmp_path):
    result = run("dcgan", *SMALL, "--conditioning", "projection", "--steps", 2, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    result = run("--resume", "--out", tmp_path / "run", "--steps", 3)
    assert result.exit_code == 0, result.output
    assert says(run("dcgan", *SMALL, "--conditioning", "project"), "did you mean projection")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files fails as a full disk does: in the middle of writing."""
    out = tmp_path / "run"
    assert run("sn_dcgan", *SMALL, "--out", out, "--steps", 2).exit_code == 0
    before = (out / CHECKPOINT).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        result = run("sn_dcgan", "--resume", "--out", out, "--steps", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert says(result, f"cannot write to {out}", "checkpoint.pt is whole", "--resume ")
    assert (out / CHECKPOINT).read_bytes() == before
    assert not list(out.glob("*.tmp"))
    assert run("sn_dcgan", "--resume", "--out", out, "--steps", 4).exit_code == 0
    assert checkpoint.load(out / CHECKPOINT).step == 4


def test_another_process_in_the_output_folder(tmp_path):
    out = tmp_path / "run"
    assert run("sn_dcgan", *SMALL, "--out", out, "--steps", 1).exit_code == 0
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert says(run("sn_dcgan", "--resume", "--out", out, "--steps", 2), "in use: another process trains in it")
    os.close(other)
    assert run("sn_dcgan", "--resume", "--out", out, "--steps", 2).exit_code == 0


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
    deadline = time.monotonic() + 240
    while not (out / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + number, output
    assert f"gankern train --resume {out}" in output
    assert "Traceback" not in output

    step = checkpoint.load(out / CHECKPOINT).step
    assert step > 0
    result = run("sn_dcgan", "--resume", "--out", out, "--steps", step + 2)
    assert result.exit_code == 0, result.output


def test_a_run_on_a_folder_is_below_runs(tmp_path, monkeypatch):
    """Wherever the folder is, and however it is named: the run is not written beside the data."""
    from matplotlib.image import imsave

    photos = tmp_path / "elsewhere" / "my photos"
    photos.mkdir(parents=True)
    for i in range(8):
        imsave(photos / f"{i}.png", [[0.1 * i] * 8] * 8)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ["--width", 4, "--latent", 4, "--batch-size", 4, "--threads", 1, "--steps", 1]
    for given, expected in ((photos, "sn_dcgan-my photos"), ("../elsewhere/my photos/.", "sn_dcgan-my photos")):
        result = run("sn_dcgan", "--data", given, *options)
        assert result.exit_code == 0, result.output
        assert [path.name for path in (tmp_path / "here" / "runs").iterdir()] == [expected]
        (tmp_path / "here" / "runs").rename(tmp_path / f"done-{len(str(given))}")
    assert len(list(photos.iterdir())) == 8


def test_repeated_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert run("sn_dcgan", *SMALL, "--steps", 1).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "sn_dcgan-digits",
        "sn_dcgan-digits-2",
        "sn_dcgan-digits-3",
    ]
    assert run("sn_dcgan", "--data", "digits", "--resume", "--steps", 2).exit_code == 0  # the last one
    steps = [checkpoint.load(path).step for path in sorted((tmp_path / "runs").iterdir())]
    assert steps == [1, 1, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume", "RUN"],
        ["sn_dcgan", "--resume", "RUN"],
        ["--resume", "RUN/checkpoint.pt"],
        ["RUN", "--resume"],
        ["--resume", "--out", "RUN"],
        ["--resume", "RUN", "--out", "RUN"],
    ],
)
def test_resume_understands_a_path(tmp_path, arguments):
    out = tmp_path / "run"
    assert run("sn_dcgan", *SMALL, "--steps", 1, "--out", out).exit_code == 0
    result = run(*(word.replace("RUN", str(out)) for word in arguments), "--steps", 2)
    assert result.exit_code == 0, result.output
    assert checkpoint.load(out).step == 2


def test_wrong_resumes(tmp_path):
    out = tmp_path / "run"
    assert run("sn_dcgan", *SMALL, "--steps", 1, "--keep", 1, "--out", out).exit_code == 0
    assert says(run("--resume"), "which run? gankern train --resume RUN")
    assert says(run("sn_dcgan", str(out)), "only --resume takes a run's folder")
    assert says(run("--resume", out, "--out", tmp_path / "other"), "a run goes on in its own folder")
    assert says(run("--resume", out / "snapshots" / "step-000001.pt"), "--start-from")
    assert says(run("--resume", tmp_path / "nowhere"), "there is no checkpoint")
    assert says(run("dcgan", "--resume", out), "model=sn_dcgan, not model=dcgan")


def test_dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("sn_dcgan", *SMALL, "--dry-run", "--steps", 7)
    assert result.exit_code == 0 and not list(tmp_path.iterdir())
    text = " ".join(result.output.split())
    config = training.configure("sn_dcgan", "digits", data.load("digits"), width=4, latent=8)
    network = games.find("sn_dcgan")(games.Run(config, "gankern"))
    weights = {name: sum(p.numel() for p in net.parameters()) for name, net in network.networks.items()}
    for name, number in weights.items():
        assert f"{name} {number:,}" in text
    total = (sum(weights.values()) * 4 + weights["generator"]) * 4 / 2**20  # weight, gradient, Adam's two; the average
    assert f"memory: {total:.1f} MiB" in text and "to runs/sn_dcgan-digits; nothing was trained" in text
    assert "1,797 images 1x8x8" in text and "7 steps of 16 samples" in text and "cpu, fp32" in text
