"""gankern info, verify and bench as a user calls them."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gankern.cli import app
from gankern.measure import benchmark, verification


def gankern(*arguments):
    """Without Triton's interpreter, which no user has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gankern.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_info():
    run = gankern("info", "--json")
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    assert facts["implementations"]["spectral_norm"]["cpu"]["cpu"] == "available"
    assert facts["native library"]["instruction_set"] in facts["native library"]["instruction_sets"].split()
    assert "avx" in gankern("info").stdout or "baseline" in gankern("info").stdout


def test_verify_writes_its_checks(tmp_path):
    file = tmp_path / "deep" / "checks.json"
    run = gankern("verify", "--quick", "--op", "spectral_norm", "--json", str(file))
    assert run.returncode == 0, run.stdout + run.stderr
    checks = json.loads(file.read_text())["checks"]
    assert {c["mode"] for c in checks} == set(verification.MODES)
    assert {c["dtype"] for c in checks} == {"float32", "bfloat16"}
    assert f"{len(checks)} of {len(checks)} checks passed" in run.stdout
    assert [p.name for p in file.parent.iterdir()] == ["checks.json"]


def test_verify_fails_loudly(monkeypatch):
    """A failed check makes the exit code 1."""
    bad = verification.Check("spectral_norm", "case", "cpu", "float32", "forward", 1.0, 0.1, 0.2, False)
    monkeypatch.setattr(verification, "verify", lambda *_: iter([bad]))
    result = CliRunner().invoke(app, ["verify"])
    assert result.exit_code == 1
    assert "0 of 1 checks passed" in result.output


def test_bench_record(tmp_path):
    file = tmp_path / "record.json"
    run = gankern("bench", "--quick", "--op", "spectral_norm", "--no-compiled", "--threads", "1", "--json", str(file))
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads(file.read_text())
    assert record["environment"]["threads"] == 1
    assert record["settings"]["copy_bandwidth"] > 1e8
    assert {r["mode"] for r in record["results"]} == set(benchmark.MODES)
    for result in record["results"]:
        assert result["implementation"] == "cpu"
        ours, peer = result["contenders"]["gankern"], result["contenders"][result["peer"]]
        assert ours["quartiles"][0] <= ours["median"] <= ours["quartiles"][1]
        assert result["interval"][0] <= result["ratio"] <= result["interval"][1]
        assert 0.3 < result["ratio"] / (peer["median"] / ours["median"]) < 3
        assert ours["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "--op", "spectral"), "unknown primitive 'spectral'; did you mean spectral_norm?"),
        (("bench", "--op", "spectral_nrom"), "did you mean spectral_norm"),
        (("verify", "--device", "tpu"), "unknown device 'tpu'; there are: cpu, cuda"),
        (("bench", "--dtype", "int8"), "unknown precision 'int8'"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message):
    """Of the commands; that the program has no more to say, tests/cli/test_bad_input.py asks."""
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_json_means_one_thing(tmp_path, monkeypatch):
    """A file, or - for the terminal; the tables are then on the other stream."""
    check = verification.Check("spectral_norm", "case", "cpu", "float32", "forward", 0.1, 0.1, 0.2, True)
    monkeypatch.setattr(verification, "verify", lambda *_: iter([check]))
    model = tmp_path / "mine.py"
    model.write_text(
        "from torch import nn\ndef g(): return nn.Sequential(nn.ConvTranspose2d(4, 2, 4), nn.ConvTranspose2d(2, 1, 4, 2, 1))\n"
    )
    commands = {
        "verify": ["verify"],
        "accelerate": ["accelerate", f"{model}:g"],
        "checkerboard": ["checkerboard", f"{model}:g", "--samples", "2"],
        "info": ["info"],
    }
    for name, command in commands.items():
        file = tmp_path / f"{name}.json"
        result = CliRunner().invoke(app, [*command, "--json", str(file)])
        assert result.exit_code == 0, result.output
        printed = CliRunner().invoke(app, [*command, "--json", "-"])
        assert printed.exit_code == 0, printed.output
        assert json.loads(printed.stdout).keys() == json.loads(file.read_text()).keys()
    assert CliRunner().invoke(app, ["info", "facts.json"]).exit_code == 2
