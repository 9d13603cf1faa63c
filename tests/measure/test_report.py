"""Records as tables, pictures and a page, and the comparison of two of them."""

import importlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gankern.cli import app
from gankern.measure import benchmark
from gankern.measure.benchmark import OURS, Contender, Result
from gankern.measure.cases import Case, all_cases
from gankern.measure.report.compare import compare
from gankern.measure.report.pictures import pictures
from gankern.measure.report.record import Record, load
from gankern.measure.report.tables import BEGIN, END, markdown_table, update_between_markers


def result(mode="forward", ours=1.0, peer=2.0, case="a case", spread=0.02, **facts):
    def contender(ms):
        return Contender(ms, (ms * (1 - spread), ms * (1 + spread)), 1000)

    contenders = {OURS: contender(ours), "eager": contender(peer), "eager, compiled": Contender(failure="no memory")}
    ratio = peer / ours
    return Result("spectral_norm", case, mode, "float32", "cpu", "cpu", contenders, "eager", ratio,
                  (ratio * 0.9, ratio * 1.1), **facts)  # fmt: skip


def record(*results, path="record.json"):
    environment = {"threads": 2, "processors": 2, "processor": "P", "gpu": None, "torch": "2", "gankern": "0",
                   "cpu_capability": "AVX2", "commit": "c", "date": "d", "allocator": {}}  # fmt: skip
    settings = {"copy_bandwidth": 2e10, "multiply_add_rate": 1e11, "freed_memory_kept": True, "quick": True}
    return {
        "environment": environment,
        "settings": settings,
        "results": [benchmark.to_dict(r) for r in results],
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cpu.json"
    results = [result(m, limit=0.5, bytes=10_000_000, operations=2_000_000) for m in benchmark.MODES]
    path.write_text(json.dumps(record(*results, result(case="slow <one>", ours=3.0))))
    return path


def test_a_record_comes_back(file):
    loaded = load(file)
    assert [benchmark.to_dict(r) for r in loaded.results] == [
        r | {"interval": list(r["interval"])} for r in json.loads(file.read_text())["results"]
    ]
    assert loaded.results[0].verdict == "2.00x"


@pytest.mark.parametrize("content", ["{", "[]", '{"results": []}', '{"results": [{"x": 1}]}'])
def test_what_is_no_record(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json: is no"):
        load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "missing.json")


def test_page_and_pictures(file, tmp_path):
    out = tmp_path / "deep" / "report"
    run = CliRunner().invoke(app, ["report", str(file), "--out", str(out)])
    assert run.exit_code == 0, run.output
    page = (out / "report.html").read_text()
    pngs = sorted(p.name for p in out.glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pngs) == len(pictures(load(file)))
    assert "cpu-roofline.png" in pngs
    assert "slow &lt;one&gt;" in page  # escaped
    assert "eager, compiled cannot: no memory" in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert "{'" not in page and "True" not in page  # words, not Python's


def test_a_bar_each_on_a_logarithmic_scale(file, tmp_path):
    """The page's ratios: contents, what they can be filtered by, and where the bars are."""
    out = tmp_path / "report"
    assert CliRunner().invoke(app, ["report", str(file), "--out", str(out)]).exit_code == 0
    page = (out / "report.html").read_text()
    bars = re.findall(r'class="mode" data-primitive="(\w+)" data-ended="([\w ]+)"', page)
    assert bars == [("spectral_norm", "faster")] * 3 + [("spectral_norm", "slower")]
    assert '<a href="#cpu-spectral_norm">spectral norm</a>' in page and 'id="cpu-spectral_norm"' in page
    # From 0.5x to 2x: 1x in the middle, 2x at the right end, 2 / 3 at log2(2 / 3) / 2 from there.
    assert '<i class="faster" style="left:50.0%;right:0.0%">' in page
    assert '<i class="slower" style="left:20.75%;right:50.0%">' in page
    for text, place in (("0.5x", 0.0), ("1x", 50.0), ("2x", 100.0)):
        assert f'<span style="left:{place}%">{text}</span>' in page


def test_the_table_between_the_markers(file, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run = CliRunner().invoke(app, ["report", str(file), "--markdown", str(readme)])
    assert run.exit_code == 0, run.output
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| spectral norm, a case | 2.00x | 2.00x | 2.00x | 1 | 50% | 1.00 |" in text
    assert not update_between_markers(readme, markdown_table([load(file)]))
    with pytest.raises(ValueError, match="does not hold the lines"):
        update_between_markers(file, "x")


def verdicts(before, after):
    (change,) = compare(Record("p", {}, {}, (before,)), [after])
    return change.verdict


def test_what_counts_as_slower():
    assert verdicts(result(), result(ours=1.2)) == "slower"
    assert verdicts(result(), result(ours=0.8)) == "faster"
    assert verdicts(result(), result(ours=1.05)) == "no difference"
    # The whole machine was slower, or the peer alone was disturbed.
    assert verdicts(result(), result(ours=1.3, peer=2.6)) == "no difference"
    assert verdicts(result(peer=3.0), result()) == "no difference"
    # Too much noise to tell.
    assert verdicts(result(spread=0.3), result(ours=1.2, spread=0.3)) == "no difference"
    assert compare(Record("p", {}, {}, (result(),)), [result(case="new")]) == []


def test_a_kernel_that_became_slower_is_caught(tmp_path, monkeypatch):
    """A case whose time is known: sleeping does not depend on what else the machine does."""
    slept = {"gankern": 0.02}

    def wait(seconds, inputs):
        time.sleep(seconds)
        return inputs[0] * 1

    case = Case(
        "spectral_norm",
        "sleep",
        lambda dtype, device: [torch.ones(2, requires_grad=True)],
        lambda implementation, inputs: wait(slept["gankern"], inputs),
        {"peer": lambda inputs: wait(0.03, inputs)},
        quick=True,
    )
    monkeypatch.setattr(importlib.import_module("gankern.cli.bench"), "all_cases", lambda: [case])
    monkeypatch.setattr(benchmark, "last_implementation", lambda name: "cpu")
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(benchmark, "multiply_add_rate", lambda device: 1e11)
    file = tmp_path / "before.json"
    run = CliRunner().invoke(app, ["bench", "--quick", "--no-compiled", "--json", str(file)])
    assert run.exit_code == 0, run.output
    again = ["bench", "--quick", "--no-compiled", "--against", str(file)]
    run = CliRunner().invoke(app, again)
    assert run.exit_code == 0, run.output
    assert "0 of 3 cases became slower" in run.output
    slept["gankern"] *= 1.2
    run = CliRunner().invoke(app, again)
    assert run.exit_code == 1, run.output
    assert "0 of 3 cases became slower" not in run.output


@pytest.mark.parametrize(
    ("document", "records", "quick"), [("README.md", "*.json", True), ("docs/benchmarks.md", "cpu-full.json", False)]
)
def test_documents_say_what_the_records_say(document, records, quick):
    root = Path(__file__).parents[2]
    found = [load(path) for path in sorted((root / "benchmarks" / "results").glob(records))]
    written = (root / document).read_text()
    assert markdown_table(found, quick) == written.partition(BEGIN)[2].partition(END)[0].strip()


def test_a_quick_table_has_the_quick_cases(tmp_path):
    file = tmp_path / "record.json"
    known = next(case for case in all_cases() if case.quick)
    results = [
        result(case="of no quick case"),
        replace(result(case=known.name), primitive=known.primitive),
        replace(result(case="part"), primitive="model", mode="critic step"),
        replace(result(case="whole"), primitive="model", mode="whole step"),
    ]
    file.write_text(json.dumps(record(*results)))
    steps, primitives = markdown_table([load(file)], quick=True).split("\n\n")
    assert [line.split(" | ")[0] for line in steps.splitlines()[2:]] == ["| whole", "| part: critic step"]
    assert len(primitives.splitlines()) == 3 and known.name in primitives
    assert len(markdown_table([load(file)]).split("\n\n")[1].splitlines()) == 4
