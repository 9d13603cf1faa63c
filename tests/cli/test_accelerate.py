"""gankern accelerate as a user calls it."""

import json

import pytest
from typer.testing import CliRunner

from gankern.cli import app

MODEL = """
import torch
from torch import nn


class Critic(nn.Module):
    def __init__(self, width=16, labels=0):
        super().__init__()
        self.conv = nn.utils.spectral_norm(nn.Conv2d(3, width, 3, padding=1))
        self.pool, self.act = nn.AvgPool2d(2), nn.LeakyReLU(0.2)
        self.last = nn.Linear(width, 1)
        self.embed = nn.Embedding(labels, width) if labels else None

    def forward(self, x, y=None, scale=1.0):
        h = self.act(self.pool(self.conv(x))).mean((2, 3)) * scale
        return self.last(h if y is None else h * self.embed(y))


class Wide(Critic):
    def __init__(self, width):
        super().__init__(width)


def conditional():
    return Critic(labels=10)


small = Critic(8)
number = 3
def wrong(): return 3
compiled = torch.compile(Critic())
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "my_critics.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments):
        result = CliRunner().invoke(app, ["accelerate", *arguments])
        return result, " ".join(result.output.split())

    return run


def test_the_report_without_writing_code(run, tmp_path):
    result, output = run("my_critics.py:Critic", "--input", "4,3,16,16", "--json", "deep/report.json", "--threads", "1")
    assert result.exit_code == 0, result.output
    for part in ("Critic:", "conv", "Conv2d 3x3", "backward", "double backward"):
        assert part in output
    report = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert report["module"] == "Critic"
    assert {m["mode"] for m in report["measured"]} == {"forward", "forward + backward", "double backward"}
    assert all(m["failure"] is None and m["error"] < 0.1 for m in report["measured"])
    assert any("spectral norm" in row["before"] for row in report["replaced"] + report["left"]) or report["notes"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("my_critics:Critic", "--input", "4,3,16,16"),
        ("my_critics:small", "--input", "4,3,16,16", "--no-fast-double-backward"),
        ("./my_critics.py:conditional", "--input", "4,3,16,16", "--input", "4:10", "--input", "=0.5"),
    ],
)
def test_targets_and_inputs(run, arguments):
    result, output = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "double backward" in output


def test_without_inputs_nothing_is_measured(run):
    result, output = run("my_critics:Critic", "--exclude", "conv")
    assert result.exit_code == 0, result.output
    assert (
        "Nothing was measured" in output and "before and after" not in output and "spectral norm (hook)" not in output
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("my_critics",), "'my_critics' is not FILE:NAME or PACKAGE:NAME"),
        (("nowhere.py:Critic",), "there is no file nowhere.py"),
        (("no_such_package:Critic",), "No module named 'no_such_package'"),
        (("my_critics:Critics",), "my_critics has no 'Critics'; its modules are Critic, Wide"),
        (("my_critics:Wide",), "cannot be called without arguments"),
        (("my_critics:number",), "is a int; it must be a torch.nn.Module, or make one"),
        (("my_critics:wrong",), "makes a int; it must make a torch.nn.Module"),
        (("my_critics:compiled",), "the module is compiled already"),
        (("my_critics:Critic", "--input", "8x3"), "--input is '8x3'; it must be a shape such as 8,3,32,32"),
        (("my_critics:Critic", "--input", "8:0"), "--input is '8:0'"),
        (("my_critics:Critic", "--input", "=f("), "--input is '=f('"),
        (("my_critics:Critic", "--input", "4,5,8,8"), "Critic cannot be called with inputs of shape (4, 5, 8, 8)"),
        (("my_critics:Critic", "--only", "nothing"), "which no submodule is called"),
    ],
)
def test_errors_are_one_line(run, arguments, says):
    result, output = run(*arguments)
    assert result.exit_code == (1 if "there is no file" in says or "No module named" in says else 2)
    assert output.startswith("Error: ") and says in output
    assert len(result.output.strip().splitlines()) == 1
