"""SIGKILL at random moments: a run always resumes, loses at most one interval, and ends with the same numbers."""

import csv
import multiprocessing
import os
import random
import signal
import time

from gankern import data, training
from gankern.training import checkpoint as checkpoints

KILLS = 10
EVERY = 5
# With what a run imports when it first makes an optimiser, a penalty, figures, a picture.
PRELOADED = ["gankern.training.loop", "gankern.penalties", "gankern.metrics", "torch._dynamo"]
PRELOADED += ["matplotlib.figure", "matplotlib.backends.backend_agg", __name__]


def start(out: str, steps: int) -> None:
    """Start, or continue, as the command does. A process of its own."""
    from pathlib import Path

    points, out = data.load("8gaussians"), Path(out)
    if (out / training.CHECKPOINT).exists():
        saved = checkpoints.load(out / training.CHECKPOINT)
        config = training.reconfigure(saved.config, steps=steps)
    else:
        saved = None
        for leftover in out.glob("*"):  # killed before the first checkpoint: nothing was lost
            leftover.rmdir() if leftover.is_dir() else leftover.unlink()
        options = dict(width=16, batch_size=32, n_critic=2, ema=0.9, evaluate_samples=100, threads=1)
        config = training.configure("wgan_gp_toy", "8gaussians", points, checkpoint_every=EVERY, steps=steps, **options)
    training.train(config, points, out, saved)


def losses(out):
    with (out / "log.csv").open(newline="") as file:
        return [(row["step"], row["gankern_d_loss"], row["gankern_g_loss"]) for row in csv.DictReader(file)]


def test_ten_kills(same, tmp_path):
    # Forked from a process that has imported everything and done nothing: a start takes milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    chance = random.Random(0)
    killed, out = 0, tmp_path / "killed"

    def run(folder, steps):
        process = context.Process(target=start, args=(str(folder), steps))
        process.start()
        return process

    for steps in (1, 1 + EVERY):  # the first waits until everything is imported
        begin = time.monotonic()
        straight = run(tmp_path / "straight", steps)
        straight.join()
        assert straight.exitcode == 0
    interval = time.monotonic() - begin

    steps = 0
    while killed < KILLS:
        before = checkpoints.load(out / training.CHECKPOINT).step if (out / training.CHECKPOINT).exists() else 0
        logged = len(losses(out)) if steps else 0
        assert logged <= before + EVERY  # what was lost: less than an interval
        process = run(out, 1_000_000)
        time.sleep(interval * chance.uniform(0.0, 2.0))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        if (out / training.CHECKPOINT).exists():
            steps = checkpoints.load(out / training.CHECKPOINT).step
            assert steps >= before and steps % EVERY == 0
    assert steps > 0, "it was never let to reach a checkpoint"

    for folder in (out, tmp_path / "straight"):
        process = run(folder, steps + EVERY)
        process.join()
        assert process.exitcode == 0
    a, b = (checkpoints.load(folder / training.CHECKPOINT) for folder in (out, tmp_path / "straight"))
    assert a.step == b.step == steps + EVERY
    assert same(a.trainers, b.trainers)
    assert losses(out) == losses(tmp_path / "straight")
