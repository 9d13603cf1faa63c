"""gankern play: what is recorded, what the file holds, and how the page behaves in a browser."""

import base64
import importlib.util
import json
import math
import re
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gankern.cli import app
from gankern.data import POINTS
from gankern.theory import play
from gankern.theory.play import page, recording

SETTINGS = {"steps": 6, "frames": 4, "width": 8, "seed": 0}
_spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(browser)


def recorded(loss, data="ring"):
    *steps, found = play.record(loss, data, steps=6, frames=4, width=8)
    assert steps == found.steps.tolist() == [0, 1, 3, 6]
    return found


@pytest.fixture(scope="module")
def runs():
    """Short runs, whose generator's sheet is still small: it is spread, so that it is seen beside the points."""
    runs = {data: [recorded(loss, data) for loss in play.LOSSES] for data in ("ring", "line")}

    def spread(sheet):
        return 20 * (sheet - sheet.mean((1, 2), keepdim=True))

    return {name: [replace(run, manifold=spread(run.manifold)) for run in several] for name, several in runs.items()}


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """The page of small recordings."""
    path = tmp_path_factory.mktemp("play") / "play.html"
    true = {name: POINTS[name].sample(50, torch.Generator().manual_seed(0)) for name in runs}
    assert play.write_page(path, runs, true, SETTINGS) == path.stat().st_size
    return path, true


# ---------------------------------------------------------------------------------------------------- recording


def test_what_is_recorded(runs):
    for found in (run for several in runs.values() for run in several):
        assert found.points.shape == found.arrows.shape == (4, 150, 2)
        assert (
            found.manifold.shape == (4, 21, 21, 2) and found.heat.shape == (4, 30, 30) and found.figures.shape == (4, 5)
        )
        assert all(x.isfinite().all() for x in (found.points, found.arrows, found.manifold, found.heat, found.figures))
        assert (found.figures[:, 2:] > 0).all() and (found.figures[:, 4] <= math.log(2)).all()


def test_one_seed_one_beginning(runs):
    """All losses begin with the same networks, so their arrows are the same slope ∇d times what each loss makes of d."""
    minimax, saturating, squares, critic = runs["ring"]
    for other in (saturating, squares, critic):
        assert torch.equal(minimax.points[0], other.points[0]) and torch.equal(minimax.heat[0], other.heat[0])
        assert not torch.equal(minimax.points[-1], other.points[-1])
    slope = critic.arrows[0]  # −∂(−d)/∂x
    torch.testing.assert_close(minimax.arrows[0] + saturating.arrows[0], slope)  # σ(d) + σ(−d) = 1
    # of least squares (1 − d)·∇d, and of minimax σ(d)·∇d: d from the second gives the first
    share = (minimax.arrows[0] * slope).sum(1) / slope.square().sum(1)
    d = share.log() - (1 - share).log()
    torch.testing.assert_close(squares.arrows[0], (1 - d)[:, None] * slope, rtol=1e-3, atol=1e-5)
    assert recorded("minimax").figures.equal(minimax.figures)


@pytest.mark.parametrize(("steps", "frames"), [(1, 2), (5, 6), (100, 80), (1200, 80)])
def test_moments(steps, frames):
    found = recording.moments(steps, frames)
    assert len(found) == frames and found[0] == 0 and found[-1] == steps
    assert all(a < b for a, b in pairwise(found))


def test_cells_of_equal_probability():
    corners = recording.latent_grid().view(21, 21, 2)
    share = 0.5 * (1 + torch.erf(corners[:, 0, 0].double() / math.sqrt(2)))
    torch.testing.assert_close(share[1:-1], torch.arange(1, 20).double() / 20, rtol=0, atol=1e-6)
    assert corners.isfinite().all()


def test_histograms():
    spread = recording.histogram(torch.full((10, 2), 5.0))  # all outside
    assert spread.sum().item() == pytest.approx(1.0) and spread.std() < 1e-15
    one = recording.histogram(torch.tensor([[-2.19, 2.19]]))
    assert one[0, -1] == one.max() and one.sum().item() == pytest.approx(1.0)  # x first


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("minmax", "ring"), "minimax"),
        (("minimax", "rings"), "ring"),
        (("minimax", "ring", {"steps": 0}), "steps must be at least 1"),
        (("minimax", "ring", {"steps": 3, "frames": 5}), "frames must be from 2 to 4"),
        (("minimax", "ring", {"width": 0}), "width"),
    ],
)
def test_bad_recordings(arguments, word):
    loss, data, *options = arguments
    with pytest.raises(ValueError, match=word):
        list(play.record(loss, data, **(options[0] if options else {})))


# ----------------------------------------------------------------------------------------------------- the file


def unpacked(path):
    """(header, runs, true points) of a page, by another reader than its own."""
    text = path.read_text()
    header = json.loads(re.search(r'<script type="application/json" id="header">(.*?)</script>', text, re.DOTALL)[1])
    content = re.search(r'id="content">(.*?)</script>', text, re.DOTALL)[1]
    data, at = np.frombuffer(zlib.decompress(base64.b64decode(content)), np.uint8), 0

    def take(number):
        nonlocal at
        at += number
        return data[at - number : at]

    def wide(moments, width):
        low, high = take(moments * width).astype(np.int32), take(moments * width).astype(np.int32)
        folded = low | high << 8
        changes = (folded >> 1) ^ -(folded & 1)
        return (
            np.cumsum(changes.reshape(moments, width), 0) % 65536 / header["levels"] * 2 * header["span"]
            - header["span"]
        )

    def narrow(moments, width):
        return np.cumsum(take(moments * width).reshape(moments, width).astype(int), 0) % 256

    runs, true = {}, {}
    for found in header["sets"]:
        for run in found["runs"]:
            m = len(run["steps"])
            parts = wide(m, 2 * header["fakes"]), wide(m, 2 * header["corners"] ** 2), narrow(m, header["heat"] ** 2)
            runs[found["name"], run["loss"]] = (*parts, narrow(m, header["fakes"]), narrow(m, header["fakes"]))
        points = take(4 * found["points"]).view("<u2")
        true[found["name"]] = points / header["levels"] * 2 * header["span"] - header["span"]
    assert at == len(data)
    return header, runs, true


def test_the_file_holds_the_recordings(made, runs):
    path, true = made
    header, found, points = unpacked(path)
    step = 2 * header["span"] / header["levels"]
    for (data, loss), (places, sheet, heat, angle, length) in found.items():
        run = next(run for run in runs[data] if run.loss == loss)
        for kept, exact in ((places, run.points), (sheet, run.manifold)):
            inside = exact.flatten(1).double().numpy().clip(-header["span"], header["span"])
            assert np.abs(kept - inside).max() <= step / 2 + 1e-9
        assert np.abs(heat / 255 - page.shades(run).flatten(1).numpy()).max() <= 0.5 / 255 + 1e-6
        slope = run.arrows.double().norm(dim=2).numpy()
        decades = math.log10(header["longest"] / header["shortest"])
        back = header["shortest"] * 10 ** (length / 255 * decades)
        seen = slope > 1e-4
        assert np.abs(np.log10(back[seen] / slope[seen])).max() <= 0.51 * decades / 255
        turn = np.angle(
            np.exp(1j * (angle / 256 * 2 * np.pi - torch.atan2(run.arrows[..., 1], run.arrows[..., 0]).numpy()))
        )
        assert np.abs(turn[seen]).max() <= np.pi / 256 + 1e-6
    for name, kept in points.items():
        assert np.abs(kept - true[name].flatten().numpy()).max() <= step
    for kept in header["sets"]:
        for head, run in zip(kept["runs"], runs[kept["name"]]):
            assert head["steps"] == run.steps.tolist()
            assert head["figures"]["w"] == pytest.approx(run.figures[:, 2].tolist(), abs=1e-4)
            assert list(head["figures"]) == list(recording.FIGURES)


def test_the_map_of_each_loss(runs):
    minimax, saturating, squares, critic = (page.shades(run) for run in runs["ring"])
    torch.testing.assert_close(minimax[0], runs["ring"][0].heat[0].sigmoid())
    assert torch.equal(minimax[0], saturating[0])
    assert torch.equal(squares[0], runs["ring"][2].heat[0].clamp(0, 1))
    assert critic.amin((1, 2)).eq(0).all() and critic.amax((1, 2)).allclose(torch.ones(4))


def test_the_file_asks_for_nothing(made):
    text = made[0].read_text()
    code = re.sub(r'id="content">.*?</script>', "", text, flags=re.DOTALL)
    assert "default-src 'none'" in code  # the browser sees to it
    for word in (
        "http://",
        "https://",
        "src=",
        "href=",
        "@import",
        "url(",
        "fetch(",
        "XMLHttpRequest",
        "WebSocket",
        "import(",
    ):
        assert word not in code, word
    assert "<main>" in code and 'lang="en"' in code and "width=device-width" in code


def test_a_moment_costs_few_bytes(tmp_path):
    """At the defaults, four data sets with four losses of 80 moments, the file stays under 5 MB: 2.9 kB a moment."""
    *_, run = play.record("wasserstein", "ring", steps=40, frames=41, width=16)
    size = play.write_page(tmp_path / "a.html", {"ring": [run]}, {"ring": torch.zeros(1, 2)}, SETTINGS)
    *_, short = play.record("wasserstein", "ring", steps=40, frames=2, width=16)
    frame = size - play.write_page(tmp_path / "b.html", {"ring": [short]}, {"ring": torch.zeros(1, 2)}, SETTINGS)
    assert frame / 39 * 80 * 16 + 40_000 < 5e6


def test_the_command(tmp_path):
    own = tmp_path / "mine & co.csv"
    own.write_text("# x, y\n0, 0\n10 5\n\n-10,5\n")
    out = tmp_path / "new" / "p.html"
    arguments = ["--steps", "2", "--frames", "2", "--width", "8", "--loss", "minimax", "--loss", "least_squares"]
    result = CliRunner().invoke(app, ["play", "--out", str(out), "--data", "line", "--points", str(own), *arguments])
    assert result.exit_code == 0, result.output
    header, runs, true = unpacked(out)
    assert list(runs) == [(d, k) for d in ("line", "mine & co") for k in ("minimax", "least_squares")]
    assert header["settings"] == {"steps": 2, "frames": 2, "width": 8, "seed": 0}
    assert np.abs(true["mine & co"]).max() == pytest.approx(1.6, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--data", "rings"], "ring"),
        (["--loss", "hinge"], "minimax"),
        (["--steps", "3", "--frames", "9"], "--frames must be from 2 to 4"),
        (["--points", "no.txt"], "--points no.txt cannot be read: No such file"),
        (["--points", "picture.png"], "--points picture.png is no text file"),
        (["--points", "bad.txt"], "line 2: two numbers are expected, got 'a b'"),
        (["--points", "one.txt"], "at least two points"),
        (["--points", "nan.txt"], "at least two points of finite numbers"),
    ],
)
def test_bad_commands(arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("bad.txt", "0 0\na b\n"), ("one.txt", "0 0\n"), ("nan.txt", "0 0\nnan 1\n")):
        Path(name).write_text(text)
    Path("picture.png").write_bytes(b"\x89PNG\xff\xfe")
    result = CliRunner().invoke(app, ["play", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code in (1, 2) and word in result.output.replace("\n", " "), result.output
    assert not Path("play.html").exists()


# -------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if browser.PATH is None:
        pytest.skip("there is no Chromium")
    tab = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser(tab, made, width, dark):
    tab.events.clear()
    tab.open(made[0], width, 850, dark)
    step = "document.getElementById('step').textContent"
    assert tab.ask(step) == "step 0 of 6"
    assert tab.ask("document.documentElement.scrollWidth") <= width
    tab.ask("document.getElementById('step').textContent = 'step 12000 of 12000'")  # the longest words still fit
    assert tab.ask("document.documentElement.scrollWidth") <= width
    tab.press("ArrowRight")
    assert tab.ask(step) == "step 1 of 6"
    tab.press("End")
    assert tab.ask(step) == "step 6 of 6"
    tab.press("ArrowLeft")
    assert tab.ask(step) == "step 3 of 6"
    assert tab.ask("document.getElementById('time').getAttribute('aria-valuetext')") == "step 3 of 6"
    tab.press("Home")

    def drawn():  # what a panel shows, as a number
        return tab.ask(
            "(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.reduce((a, b, i) => (a * 31 + b * (i % 7 + 1)) % 1e9, 7))(document.querySelector('.plane'))"
        )

    both = drawn()
    tab.press("d")
    discriminator = drawn()
    tab.press("g")
    generator = drawn()
    tab.press("b")
    assert drawn() == both and len({both, discriminator, generator}) == 3
    shown = "document.querySelectorAll('.run:not([hidden])').length"
    assert tab.ask(shown) == 4
    for key in "1234":
        tab.press(key)
    assert tab.ask(shown) == 1  # one stays
    for key in "123":
        tab.press(key)
    tab.press(" ")
    for _ in range(200):
        if tab.ask(f"!document.getElementById('play').textContent.includes('Pause') && {step} === 'step 6 of 6'"):
            break
    assert tab.ask(step) == "step 6 of 6" and tab.ask("gankernRate.frames") > 3
    tab.ask("(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.getElementById('data'))")
    assert tab.ask("document.querySelector('.plane').getAttribute('aria-label')").startswith("minimax on line, step 6")
    tab.press("Tab")
    assert tab.ask("document.activeElement.id") == "play"
    assert tab.ask("getComputedStyle(document.activeElement).outlineStyle") != "none"
    names = tab.ask(
        "[...document.querySelectorAll('button, input, select')].filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"
    )
    assert names == 0
    assert tab.ask(
        "[...document.querySelectorAll('canvas')].every(c => c.getAttribute('role') === 'img' && c.getAttribute('aria-label'))"
    )
    assert tab.errors() == [] and tab.requests() == []
