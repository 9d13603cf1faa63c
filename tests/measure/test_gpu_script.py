"""scripts/gpu.py, which a GPU machine runs for minutes: its stages, its limits and its bars, without a GPU."""

import importlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gankern.core import devices
from gankern.measure import device
from gankern.ops import convolution_choice

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu.py"
sys.path.append(str(SCRIPT.parent))
bars, checks, choices, primitives, records, training = (
    importlib.import_module(f"gpu_stages.{name}")
    for name in ("bars", "checks", "choices", "primitives", "records", "training")
)


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stage_on_the_cpu(tmp_path):
    command = [sys.executable, SCRIPT, "--dry-run-on-cpu", "--stage", "environment"]
    ran = subprocess.run(command, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"]["environment"].startswith("passed")
    assert summary["environment"][0]["packages"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_every_stage_is_there_and_bounded(gpu):
    assert gpu.RUN.keys() == {*gpu.STAGES, "build"}
    assert len(gpu.STAGES) <= 8  # a file each, but the environment's, which is in the summary
    assert all(10 <= seconds <= 240 for seconds in gpu.STAGES.values())
    assert sum(gpu.STAGES.values()) == 480  # what it is held for
    assert list(gpu.STAGES).index("host") > list(gpu.STAGES).index("device")  # the autograd nodes are built meanwhile


def test_what_a_stage_leaves_of_its_time_the_next_one_has(gpu, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(gpu, "STAGES", {"host": 10, "steps": 20, "variants": 30})
    monkeypatch.setattr(gpu, "_bounded", lambda name, out, device, seconds: given.update({name: seconds}) or ("", ""))
    gpu.run_all(["host", "steps", "variants"], tmp_path, "cuda", 120)
    assert [round(given[name]) for name in ("host", "steps", "variants")] == [20, 60, 120]


def test_tests_are_dealt_out_and_stopped(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "test_some.py").write_text(
        "import time\n"
        "def test_a(): pass\n"
        "def test_b(): assert 0, 'wrong'\n"
        "def test_c(): time.sleep(60)\n"
        "def test_d(): pass\n"
    )
    rows = list(checks._dealt_out(["test_some.py"], 3, 15))
    assert [row["status"] for row in rows[2:]] == ["stopped"]
    assert {row["status"]: row.get("passed") for row in rows[:2]} == {0: 2, 1: None}
    assert sorted(row["failures"][0] for row in rows if row["failures"]) == [
        "did not come to an end: test_some.py::test_c ", "test_some.py::test_b - AssertionError: wrong"]  # fmt: skip
    (tmp_path / "test_some.py").write_text("import nothing_of_that_name\n")
    (row,) = checks._dealt_out(["test_some.py"], 3, 30)
    assert row["status"] == 2 and "nothing_of_that_name" in row["output"]


def test_sanitizers_are_dealt_out_and_seen(gpu, tmp_path, monkeypatch):
    """A command in compute-sanitizer's place: whichever of its processes finds something fails the tool."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\ntool=$2; shift 4; "$@" || exit $?\n[ $tool = memcheck ] || exit 9\n')
    tool.chmod(0o755)
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_every_primitive.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_same_bits_a(): pass\ndef test_other(): assert 0\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    record = records.Record(tmp_path, "sanitizer")
    with pytest.raises(RuntimeError, match="^racecheck failed"):
        checks.sanitizer(record, "cuda")
    rows = [(row["tool"], row["status"], row["passed"]) for row in record.content["results"]]
    assert rows == [("memcheck", 0, 1), ("racecheck", 9, 1)]


def test_work_in_processes_is_bounded(gpu):
    found = records.in_processes(math.sqrt, [(4.0,), (-1.0,), (9.0,)], 60)
    assert found["calls"] == 3 and found["done"] == 2 and "ValueError" in found["errors"][0]
    found = records.in_processes(time.sleep, [(60,)], 1)
    assert found["done"] == 0 and found["seconds"] < 30


def test_a_stage_that_hangs_or_fails_leaves_its_record_and_the_others_run(gpu, tmp_path, monkeypatch):
    """In the stages' place, functions of a script of three lines."""
    script = tmp_path / "stages.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import gpu, time\n"
        "gpu.RUN['host'] = lambda record, device: (record.add(first=1), time.sleep(60))\n"
        "gpu.RUN['steps'] = lambda record, device: (record.add(second=2), 1 / 0)\n"
        "gpu.RUN['variants'] = lambda record, device: record.add(third=3)\n"
        "sys.exit(gpu.main())\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "STAGES", {"host": 6, "steps": 30, "variants": 30})
    out = tmp_path / "out"
    out.mkdir()
    begin = time.monotonic()
    assert gpu.run_all(["host", "steps", "variants"], out, "cuda", 66) == 1
    assert time.monotonic() - begin < 50
    summary = json.loads((out / "summary.json").read_text())
    assert "stopped after 6 s" in summary["stages"]["host"]
    assert summary["stages"]["steps"] == "FAILED with status 1" and "ZeroDivisionError" in summary["logs"]["steps"]
    assert summary["stages"]["variants"].startswith("passed")
    rows = [json.loads((out / f"{stage}.json").read_text())["results"] for stage in ("host", "steps", "variants")]
    assert rows == [[{"first": 1}], [{"second": 2}], [{"third": 3}]]


def test_a_lost_process_is_begun_again_behind_what_it_was_lost_in(gpu, tmp_path, monkeypatch):
    """One that crashes, one that hangs within another one, and one behind which the device is lost: each is a figure
    that is missing, and those before are not measured twice."""
    script, counted = tmp_path / "stages.py", tmp_path / "counted"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import gpu, os, signal, time\n"
        "from gpu_stages import records\n"
        f"def count(): open({str(counted)!r}, 'a').write('1'); return 1.5\n"
        "def wrong():\n"
        "    records._device_is_lost = lambda: True\n"
        "    raise RuntimeError('an illegal memory access')\n"
        "def several(): return {'a': records.attempt(count), 'b': records.attempt(lambda: time.sleep(60))}\n"
        "def host(record, device):\n"
        "    record.add(first=records.attempt(count))\n"
        "    record.add(second=records.attempt(lambda: os.kill(os.getpid(), signal.SIGSEGV)))\n"
        "    record.add(third=records.attempt(several))\n"
        "    record.add(fourth=records.attempt(wrong))\n"
        "    record.add(fifth=records.attempt(count))\n"
        "gpu.RUN['host'] = host\n"
        "sys.exit(gpu.main())\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "PATIENCE", 2)
    out = tmp_path / "out"
    out.mkdir()
    assert gpu.run_all(["host"], out, "cuda", 60) == 0
    state = json.loads((out / "summary.json").read_text())["stages"]["host"]
    assert state.startswith("passed, begun again 3 times in ")
    assert json.loads((out / "host.json").read_text())["results"] == [
        {"first": 1.5},
        {"second": "ended its process: status -11"},
        {"third": {"a": 1.5, "b": "did not come to an end within 2 s"}},
        {"fourth": "RuntimeError: an illegal memory access"},
        {"fifth": 1.5},
    ]
    assert counted.read_text() == "111"
    assert sorted(path.name for path in out.iterdir()) == ["host.json", "summary.json"]


def test_a_line_of_the_journal_that_was_cut_is_none(gpu, tmp_path):
    path = tmp_path / "journal"
    path.write_text("[0]\n[0, 1, 2.5]\n[1]\n[1, 2, [3]")
    journal = records.Journal(path)
    assert journal.ended == {0: (1, 2.5)} and journal.lost == 1
    assert journal.attempt(lambda: 7) == 2.5 and journal.attempt(lambda: 7) == ""
    assert records.Journal(path).lost is None


def test_what_is_built_is_put_beside_the_sources_between_stages(gpu, tmp_path, monkeypatch):
    """A folder that cannot be written to is said, and loses nothing."""
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "READY", tmp_path / "ready")
    checks.install_what_is_built()
    checks.READY.mkdir()
    for name in ("libone.so", "libtwo.so.part"):
        (checks.READY / name).write_text("whole")
    checks.install_what_is_built()  # nowhere to go
    (tmp_path / "gankern").mkdir()
    checks.install_what_is_built()
    assert [path.name for path in (tmp_path / "gankern").iterdir()] == ["libone.so"]
    record = records.Record(tmp_path, "variants")
    monkeypatch.setattr(devices, "DEVICES", tmp_path / "libtwo.so.part" / "devices")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    (tmp_path / "libtwo.so.part").write_text("a file, not a folder")
    choices.keep_choices(record, "cuda", tiers={"spectral_norm": "cuda"})
    assert json.loads((tmp_path / "variants.json").read_text())["device_file"]["tiers"] == {"spectral_norm": "cuda"}


def test_what_has_no_time_left_is_not_run(gpu, tmp_path):
    assert gpu.run_all(["host"], tmp_path, "cpu", 2) == 1
    assert json.loads((tmp_path / "summary.json").read_text())["stages"]["host"].startswith("NOT RUN")


def test_bars(gpu, tmp_path):
    def write(stage, *rows):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"results": rows}))

    row = {"dtype": "float32", "layout": "contiguous", "limit_ms": 0.9}
    times = {"gankern": {"f+b": 1.0}, "eager": "RuntimeError: no"}
    write(
        "device",
        {"case": "bias_act large", **row, "contenders": times},
        {"case": "upfirdn2d up large", **row, "contenders": {"gankern": {"f+b": "RuntimeError: no"}}},
        {"case": "bias_act large", **row, "contenders": {"compiled": {"f+b": 0.9}}},
        {"case": "minibatch_discrimination", "mode": "forward", "contenders": {"gankern": 0.1}},
    )
    steps = {"gankern": {"ms": 5.0}, "torch, accelerated": {"ms": 4.0}}
    write(
        "steps",
        {"step": "WGAN-GP ResNet-32, batch 64", "mode": "whole step, graphed", "fast": False, "contenders": steps},
        {
            "step": "WGAN-GP ResNet-32, batch 64",
            "mode": "whole step, graphed",
            "fast": False,
            "contenders": {"torch, graphed": {"ms": 10.0}},
        },
        {"step": "DCGAN-64, batch 64", "mode": "whole step", "fast": True, "contenders": {"torch": {"ms": 1.0}}},
        {"step": "DCGAN-64, batch 64", "variant": "torch", "kernels": []},
    )
    write("tests", {"what": "tests", "status": 1})
    rows = bars.bars(tmp_path)
    found = {
        row["bar"].rpartition(": ")[2]: (row["figure"], row["least"], row["met"])
        for row in rows
        if row["figure"] is not None
    }
    assert found == {
        "share of the copy limit": (0.9, 0.85, True),
        "against torch.compile": (0.9, 1.0, False),
        "against the fastest of torch's": (2.0, 2.5, False),
        "tests without a failure": (0.0, 1.0, False),
    }
    missing = [row["bar"] for row in rows if row["figure"] is None]
    share = ": share of the copy limit"
    assert f"bias_act large, bfloat16, contiguous{share}" in missing
    assert f"bias_act large, float32, contiguous{share}" not in missing
    assert "bias_act large, bfloat16, contiguous: against torch.compile" in missing
    assert "WGAN-GP, fp32, whole step" in missing and "WGAN-GP, fp32, whole step, graphed" not in missing
    assert "WGAN-GP, bf16 channels_last, whole step, graphed" in missing
    assert f"upfirdn2d up large, float32, contiguous{share}" in missing  # it ran, and failed
    assert not any("sanitizer" in bar for bar in missing)  # nobody asked for that stage
    write("sanitizer", {"tool": "memcheck", "status": 0}, {"tool": "memcheck", "status": 5})
    last = {row["bar"]: row["met"] for row in bars.bars(tmp_path) if "sanitizer" in row["bar"]}
    assert last == {"compute-sanitizer memcheck without a failure": True,
                    "compute-sanitizer racecheck without a failure": False}  # fmt: skip
    write("sanitizer", *({"tool": "memcheck", "status": status} for status in (9, "stopped", 0)))
    assert not any(row["met"] for row in bars.bars(tmp_path) if "sanitizer" in row["bar"])


def test_every_bar_has_a_row_without_a_figure(gpu, tmp_path):
    """Where every stage was asked for and nothing ran, the summary still names all that is promised, each once."""
    for stage in gpu.STAGES:
        (tmp_path / f"{stage}.json").write_text(json.dumps({"results": []}))
    rows = bars.bars(tmp_path)
    names = [row["bar"] for row in rows]
    assert len(set(names)) == len(names) and not any(row["met"] for row in rows)
    counted = {
        "share of the copy limit": 4 * len(bars.LARGE) + 1,
        "against torch.compile": 4 * len(bars.LARGE),
        "against the fastest parametrization": 3,
        "against the fastest compiled": 4,
        "against the fastest peer": 6,
        "whole step, graphed": 2 * 6,
        "whole step": 2 * 6,
        "against the original": len(bars.LAYERS) * 2 * len(bars.LAYER_MODES),
        "without a failure": 4,
    }
    for end, count in counted.items():
        assert sum(name.endswith(end) for name in names) == count, end
    assert sum(counted.values()) == len(names)
    assert {name.split(" large")[0] for name in names if " large" in name} == set(bars.LARGE)


def test_large_cases_are_those_with_bars(gpu):
    cases = primitives.device_cases("cpu")
    assert {name.removesuffix(" large") for name, *_ in cases if name.endswith("large")} == set(bars.LARGE)
    assert all(peer is not None for *_, peer, _ in cases)
    for _, shape, ours, peer, _ in cases:
        inputs = primitives.inputs_of(shape, torch.float64, "channels_last", "cpu")
        torch.testing.assert_close(ours(*inputs), peer(*inputs).to(torch.float64))


def test_the_discriminator_of_biggan(gpu):
    """Its layers and their size are the published ones; on a small one, the case runs as on a device."""
    with FakeTensorMode():
        weights = primitives._biggan_weights(torch.float32, "cpu")
    weights = weights[: len(weights) // 3]
    assert len(weights) == 12 + 5 + 4 + 2
    biases = sum(w.shape[0] for w in weights[:17]) + 1  # of the blocks and of the last layer
    assert sum(w.numel() for w in weights) + biases + 1 == 87_982_370  # and the attention's factor
    case = next(case for case in primitives._cases_of_their_own("cuda") if case.name == primitives.BIGGAN)
    inputs = primitives._biggan_weights(torch.float64, "cpu", widths=(3, 8, 16, 16), classes=5)
    for ours, torchs in zip(case.run(None, [x.clone() for x in inputs]), case.peers["torch parametrization"](inputs)):
        torch.testing.assert_close(ours, torchs)


def test_bars_of_primitives_with_cases_of_their_own(gpu, tmp_path):
    cases = [
        ("spectral_norm SN-DCGAN-64 discriminator, grouped", "forward + backward",
         {"gankern": 1.0, "gankern, cuda": 2.0, "torch parametrization": 9.0, "eager": 3.0}),
        ("minibatch_discrimination N=256 B=100 C=5", "forward + backward",
         {"gankern": 1.0, "broadcast": 2.5, "cdist": "OutOfMemoryError: no"}),
        ("minibatch_discrimination N=256 B=100 C=5", "double backward", {"gankern": 1.0, "broadcast": 12.0}),
        ("minibatch_discrimination N=256 B=100 C=5", "forward", {"gankern": 1.0, "broadcast": 1.0}),
        ("minibatch_discrimination N=64 B=100 C=5", "double backward", {"gankern": "RuntimeError: no"}),
        ("spectral_norm 1024 x 8192, grouped", "forward + backward", {"gankern": 0.7}),
        ("spectral_norm SN-DCGAN-64 discriminator, grouped", "forward + backward",
         {"torch parametrization, compiled": 1.5}),
    ]  # fmt: skip
    rows = [{"case": case, "mode": mode, "dtype": "float32", "contenders": times} for case, mode, times in cases]
    (tmp_path / "device.json").write_text(json.dumps({"results": rows, "copy_bandwidth": 7 * 2**25 / 0.56e-3}))
    measured = [row for row in bars.bars(tmp_path) if row["figure"] is not None]
    found = {row["bar"]: (row["figure"], row["least"], row["met"]) for row in measured}
    assert found == {
        "spectral_norm SN-DCGAN-64 discriminator, grouped, forward + backward: against the fastest parametrization": (
            9.0, 8.0, True),
        "spectral_norm SN-DCGAN-64 discriminator, grouped, forward + backward: against the fastest compiled": (
            1.5, 2.0, False),
        "minibatch_discrimination N=256 B=100 C=5, forward + backward: against the fastest peer": (2.5, 3.0, False),
        "minibatch_discrimination N=256 B=100 C=5, double backward: against the fastest peer": (12.0, 10.0, True),
        "spectral_norm 1024 x 8192, grouped: share of the copy limit": (0.8, 1 / 1.5, True),
    }  # fmt: skip


def test_bars_count_what_the_file_of_the_device_takes(gpu, tmp_path):
    """CUDA C++ where it is a tenth faster, which the file then says; a little faster, and it is Triton's figure that
    counts. A figure that there is not counts for nothing."""
    kind = {"dtype": "float32", "layout": "contiguous", "limit_ms": 0.5}
    own = "minibatch_discrimination N=256 B=100 C=5"
    triton, cuda = {bars.IN_TRITON: 1.1, "gankern": 1.2}, {bars.IN_CUDA: 1.0}
    rows = [
        {"case": "upfirdn2d up large", **kind, "contenders": {"gankern": {"f+b": 1.0}, bars.IN_CUDA: {"f+b": 0.8}}},
        {"case": own, "mode": "double backward", "contenders": triton | cuda | {"broadcast": 11.0}},
    ]
    (tmp_path / "device.json").write_text(json.dumps({"results": rows}))

    def figures(**content):
        (tmp_path / "variants.json").write_text(json.dumps({"results": [], **content}))
        return [row["figure"] for row in bars.bars(tmp_path) if row["figure"] is not None]

    assert figures() == figures(device_file={"tiers": {}}) == [0.5, 10.0]
    assert figures(device_file={"tiers": {"upfirdn2d": "cuda"}}) == [0.625, 10.0]
    assert figures(device_file={"tiers": {"minibatch_discrimination": "cuda"}}) == [0.5, 11.0]
    rows[0]["contenders"][bars.IN_CUDA]["f+b"] = "RuntimeError: no"
    (tmp_path / "device.json").write_text(json.dumps({"results": rows}))
    assert figures(device_file={"tiers": {"upfirdn2d": "cuda"}}) == [10.0]


def test_the_bars_name_cases_that_there_are(gpu):
    from gankern.measure.cases import all_cases

    names = [f"{case.primitive} {case.name}" for case in primitives._cases_of_their_own("cuda")]
    peers = [f"{peer}{end}" for case in all_cases() for peer in case.peers for end in ("", ", compiled")]
    for start, _, peer, _ in bars.OF_THEIR_OWN:
        assert any(name.startswith(start) for name in names), start
        assert any(peer in name for name in peers), peer


def test_the_tiers_of_a_device(gpu, tmp_path, monkeypatch):
    def measured(run, case, mode, *options):
        if case.primitive == "upfirdn2d" and "down" in case.name:
            raise RuntimeError("no kernel image")
        return {"triton": 1.0, "cuda": 1.05 if case.primitive == "spectral_norm" else 0.8}[run.args[0]]

    record = records.Record(tmp_path, "variants")
    assert choices._fastest_tiers(record, "cpu") == {}  # with one tier or none there is nothing to choose
    monkeypatch.setattr(choices, "tiers_of", lambda primitive, where: ["triton", "cuda"])
    monkeypatch.setattr(choices, "replayed", measured)
    # Of kernels for large maps alone, these are compared.
    monkeypatch.setattr(choices, "with_cuda", lambda where: ["batch_norm_act"])
    monkeypatch.setattr(choices, "_kinds_of", lambda name, where: [(f"{name} large", lambda tier: tier)])
    monkeypatch.setattr(choices, "_milliseconds", lambda step, where: {"triton": 1.0, "cuda": 0.7}[step])
    chosen = {"minibatch_discrimination": "cuda", "batch_norm_act": "cuda"}
    assert choices._fastest_tiers(record, "cpu") == chosen

    def fails(tier):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(choices, "_kinds_of", lambda name, where: [(f"{name} large", fails)])
    failing = records.Record(tmp_path, "failing")
    assert choices._fastest_tiers(failing, "cpu") == {"minibatch_discrimination": "cuda"}  # and the stage goes on
    rows = json.loads((tmp_path / "variants.json").read_text())["results"]
    primitives = {"spectral_norm", "minibatch_discrimination", "upfirdn2d", "batch_norm_act"}
    assert {row["tiers_of"] for row in rows} == primitives
    (large,) = (row for row in rows if row["tiers_of"] == "batch_norm_act")
    assert large == {
        "tiers_of": "batch_norm_act", "case": "batch_norm_act large", "ms": {"triton": 1.0, "cuda": 0.7}
    }  # fmt: skip
    assert any(row["ms"]["cuda"] == "RuntimeError: no kernel image" for row in rows)


def test_the_ways_of_convolutions_on_a_device(gpu, tmp_path, monkeypatch):
    """The stage as a dry run has it; and each choice of a device goes to its file beside those that are there."""
    record = records.Record(tmp_path, "convolutions")
    choices.convolutions(record, "cpu")
    rows = record.content["results"]
    assert {row["kind"] for row in rows} == {"upsample", "downsample", "same"} and len(rows) == 12
    assert all(isinstance(ms, float) for row in rows for ms in row["ms"].values())
    found = record.content["device_file"]["convolutions"]
    assert found.keys() == {"upsample", "downsample"}
    for by_layout in found.values():
        assert by_layout.keys() == {
            f"{d} {m}" for d in ("float32", "bfloat16") for m in ("contiguous", "channels_last")
        }
        for ((*shape, times),) in by_layout.values():
            assert shape == [4, 3, 2 * 4 * 4] and times.keys() == set(convolution_choice.ON_DEVICE)
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    choices.keep_choices(record, "cuda", blocks={"bias_act": {"BLOCK": 2}}, tiers={"spectral_norm": "cuda"})
    choices.keep_choices(record, "cuda", convolutions=found)
    choices.keep_choices(record, "cuda", blocks={"bias_act": {"BLOCK": 4}})
    content = json.loads((tmp_path / "Some_GPU.json").read_text())
    assert content == record.content["device_file"] and content["device"] == "Some GPU"
    assert (content["blocks"], content["tiers"]) == ({"bias_act": {"BLOCK": 4}}, {"spectral_norm": "cuda"})
    assert content["convolutions"] == found


def test_what_accelerate_does_to_layers(gpu, tmp_path):
    """Each kind of layers that it looks for, in every mode; and the summary says where it made them slower."""
    record = records.Record(tmp_path, "steps")
    training.penalties(record, "cpu")
    training.accelerated_layers(record, "cpu")
    assert all(isinstance(ms, float) for row in record.content["results"] for ms in row["contenders"].values())
    assert [row["critic"] for row in record.content["results"] if "critic" in row] == [*training.CRITICS]
    rows = [row for row in record.content["results"] if "layers" in row]
    assert len(rows) == len(bars.LAYERS) * len(bars.LAYER_SIZES) * len(bars.LAYER_MODES)
    for row, original in zip(rows, (3.0, 0.9)):
        row["contenders"] = {"original": original, "accelerated": 1.0}
    record.write()
    first, second, *_ = [row for row in bars.bars(tmp_path) if row["bar"].startswith("accelerate, ")]
    assert first == {"bar": "accelerate, LeakyReLU, 16 maps of 8x8, forward: against the original", "figure": 3.0,
                     "least": 0.95, "met": True}  # fmt: skip
    assert second["figure"] == 0.9 and not second["met"]


def test_what_accelerate_does_on_a_device_is_what_was_not_slower_there(gpu):
    def row(layers, size, mode, original=1.0, accelerated=1.0):
        return {"layers": layers, "size": size, "mode": mode,
                "contenders": {"original": original, "accelerated": accelerated}}  # fmt: skip

    small, large = bars.LAYER_SIZES
    rows = [row(*key) for key in itertools.product(bars.LAYERS, bars.LAYER_SIZES, bars.LAYER_MODES)]
    of_maps = {"pairs": 16 * 64 * 8 * 8, "second derivative": 16 * 64 * 8 * 8}
    assert training.worth_accelerating(rows) == {**of_maps, "spectral norm": 64 * 64 * 9}
    assert training.worth_accelerating([*rows, row("Upsample Conv2d", small, "forward", 0.9)]) == {
        **of_maps, "pairs": 64 * 128 * 32 * 32, "spectral norm": 64 * 64 * 9}  # fmt: skip
    assert training.worth_accelerating([*rows, row("HookedSpectralNorm LeakyReLU", small, "penalty", 0.9)]) == {
        **of_maps, "spectral norm": 128 * 128 * 9}  # fmt: skip
    assert training.worth_accelerating([*rows, row("Upsample Conv2d", large, "penalty", 0.9)]).keys() == {
        "second derivative", "spectral norm"}  # fmt: skip
    assert training.worth_accelerating(
        [*rows, row("LeakyReLU", large, "forward", "no")]
    ) == training.worth_accelerating(rows)
    assert training.worth_accelerating([r for r in rows if r["mode"] != "penalty"]) == {}
    assert {name for names, _ in training.DECIDED.values() for name in names} == {*bars.LAYERS}
    # Penalties by the tangent form, from the least samples on of which it was not slower.
    critics = [{"critic": name, "contenders": {"double_backward": 1.0, "tangent": ms}} for name, ms in
               zip(training.CRITICS, (1.1, 0.9, 0.8))]  # fmt: skip
    assert training.worth_accelerating(critics) == {"tangent form": 64 * 3 * 64 * 64}
    assert training.worth_accelerating(critics[:2]) == {}


def test_another_tier_must_be_worth_it(gpu):
    assert choices.is_worth([1.1, 1.3]) and choices.is_worth([0.96, 1.4])
    assert not choices.is_worth([1.0, 1.1])  # a twentieth in the mean
    assert not choices.is_worth([0.9, 3.0])  # slower somewhere
    assert not choices.is_worth([0.0, 3.0]) and not choices.is_worth([])  # one that failed; nothing measured


def test_times_on_the_cpu():
    calls = []
    ms = device.milliseconds(device.graph_of(lambda: calls.append(time.sleep(0.002)), "cpu"), "cpu", 0.05, rounds=3)
    assert 2.0 <= ms < 20 and len(calls) >= 5
    assert 2000 <= device.host_microseconds(lambda: time.sleep(0.002), "cpu", calls=3, rounds=2) < 20_000
    assert device.peak_megabytes(lambda: None, "cpu") is None


def test_bars_count_the_block_sizes_that_are_chosen(gpu, tmp_path):
    """They are measured on the cases that bars are of, behind the device stage."""
    rows = [
        {"case": f"{name} large", "dtype": "float32", "layout": "contiguous", "limit_ms": 0.5,
         "contenders": {"gankern": {"f+b": 1.0}, bars.IN_CUDA: {"f+b": 0.9}}}
        for name in ("bias_act_pixel_norm", "upfirdn2d up")
    ]  # fmt: skip
    (tmp_path / "device.json").write_text(json.dumps({"results": rows}))
    named = [f"{row['case']}, float32, contiguous" for row in rows]
    variants = [
        {"kernel": kernel, "variant": {"BLOCK": block}, "ms": {label: ms}}
        for kernel, label in zip(("pixel_norm", "upfirdn2d"), named)
        for block, ms in ((1, 1.1), (2, 0.625), (3, "RuntimeError: no"))
    ]

    def figures(tiers, **blocks):
        file = {"tiers": tiers, "blocks": {kernel: {"BLOCK": block} for kernel, block in blocks.items()}}
        (tmp_path / "variants.json").write_text(json.dumps({"results": variants, "device_file": file}))
        return [row["figure"] for row in bars.bars(tmp_path) if row["figure"] is not None]

    assert figures({}) == figures({}, pixel_norm=3, upfirdn2d=3) == [0.5, 0.5]
    assert figures({}, pixel_norm=2, upfirdn2d=1) == [0.8, 0.455]
    assert figures({"upfirdn2d": "cuda"}, upfirdn2d=2) == [0.5, 0.556]


def test_variants_are_measured_on_cases_of_bars(gpu):
    from gankern.triton.launch import Blocks

    for name in choices._variant_cases("cpu"):
        choices._blocks_of(name)
    cases = {name: [case for case, _, _ in found] for name, found in choices._variant_cases("cpu").items()}
    assert cases.keys() == Blocks.known.keys()
    labels = {f"{name} large" for name in bars.LARGE}
    assert {case for found in cases.values() for case in found} - labels == {"minibatch_discrimination"}
    steps = list(choices._variant_steps("pixel_norm", "cpu"))
    assert [label for label, _ in steps] == [
        f"bias_act_pixel_norm large, {dtype}, {layout}"
        for dtype in ("float32", "bfloat16") for layout in ("contiguous", "channels_last")
    ]  # fmt: skip
    steps[3][1]()
    assert [label for label, _ in choices._variant_steps("minibatch_discrimination", "cpu")] == [
        "minibatch_discrimination, float32, contiguous"
    ]
