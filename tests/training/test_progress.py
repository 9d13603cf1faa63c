"""What a run says while it trains: plain lines where it is not on a terminal."""

import io
import re

import pytest
from rich.console import Console

from gankern import data, training
from gankern.training import progress as told
from gankern.training.trainer import Step

IMAGES = 64


def run(tmp_path, terminal, steps=3, saved=None, **options):
    images = data.load("digits")[:IMAGES]
    options = dict(width=2, latent=4, batch_size=8, checkpoint_every=2, threads=1) | options
    config = training.configure("sn_dcgan", "digits", images, steps=steps, **options)
    if saved is not None:
        config = training.reconfigure(saved.config, steps=steps)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    record = training.train(config, images, tmp_path / "run", saved, console)
    return console.file.getvalue(), record


def test_a_log_gets_a_header_and_lines(tmp_path):
    text, record = run(tmp_path, terminal=False, compare=True)
    header, *lines = text.splitlines()
    for word in (
        "sn_dcgan",
        "torch and gankern",
        "digits, 64 images 1x8x8",
        "3 steps of 8 samples",
        "cpu",
        "1 threads",
    ):
        assert word in header, header
    numbers = [
        int(number.replace(",", "")) for number in re.findall(r"\w+ ([\d,]+)(?=[,;])", header.split(";")[1] + ";")
    ]
    assert numbers == list(record["parameters"].values())
    assert [line.split(":")[0] for line in lines] == ["step 1 of 3", "step 3 of 3"]  # the others are within ten seconds
    for line in lines:
        assert re.search(r"torch D -?\d+\.\d{3} G -?\d+\.\d{3} \d+ images/s; gankern D .* elapsed, .* remaining$", line)
        assert "\x1b" not in line
    assert lines[-1].endswith("0:00:00 remaining")


def test_a_run_that_goes_on_says_from_where(tmp_path):
    run(tmp_path, terminal=False, steps=2)
    saved = training.find_run(tmp_path / "run")[1]
    text, _ = run(tmp_path, terminal=False, steps=4, saved=saved)
    header, *lines = text.splitlines()
    assert "steps 3 to 4" in header and [line.split(":")[0] for line in lines] == ["step 3 of 4", "step 4 of 4"]


def test_a_terminal_gets_bars(tmp_path):
    text, _ = run(tmp_path, terminal=True)
    assert "\x1b" in text and "3/3" in text and "images/s" in text and "remaining" not in text


def test_nobody_who_listens(tmp_path):
    images = data.load("digits")[:IMAGES]
    config = training.configure("sn_dcgan", "digits", images, steps=1, width=2, latent=4, batch_size=8, threads=1)
    assert training.train(config, images, tmp_path / "run")["steps"] == 1


@pytest.mark.parametrize(
    ("seconds_a_step", "expected"), [(4.0, [1, 4, 7, 10]), (10.0, list(range(1, 11))), (0.1, [1, 10])]
)
def test_a_line_every_ten_seconds(monkeypatch, seconds_a_step, expected):
    now = [100.0]
    monkeypatch.setattr(told, "monotonic", lambda: now[0])
    images = data.load("digits")[:IMAGES]
    config = training.configure("sn_dcgan", "digits", images, steps=10, width=2, latent=4, batch_size=8)
    console = Console(file=io.StringIO(), force_terminal=False)
    with told.progress(config, images, {}, 0, console) as advance:
        for _ in range(10):
            now[0] += seconds_a_step
            advance({"gankern": Step({"d": 1.0, "g": 2.0}, {"d": seconds_a_step / 2, "g": seconds_a_step / 2})})
    lines = console.file.getvalue().splitlines()[1:]
    assert [int(line.split()[1]) for line in lines] == expected
    assert f"D 1.000 G 2.000 {8 * config.n_critic / seconds_a_step:.0f} images/s" in lines[-1]
