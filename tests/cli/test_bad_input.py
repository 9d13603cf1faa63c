"""What commands say of wrong options, files that cannot be written, and records that are none: one line, before work."""

import html
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gankern import data, training
from gankern.cli import app
from gankern.measure import benchmark, verification
from gankern.measure.report.record import load

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def run(*arguments, **options):
    return CliRunner().invoke(app, list(map(str, arguments)), **options)


def says(result, *words):
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    images = data.load("digits")[:64]
    options = dict(width=2, latent=4, batch_size=8, steps=2, checkpoint_every=1, threads=1)
    training.train(training.configure("sn_dcgan", "digits", images, **options), images, out)
    return out


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was measured before the file was asked for")

    for name in ("copy_bandwidth", "multiply_add_rate", "measure"):
        monkeypatch.setattr(benchmark, name, never)
    monkeypatch.setattr(verification, "verify", never)
    monkeypatch.setattr("gankern.accelerate", never)


@pytest.mark.parametrize("command", ["verify", "bench", "accelerate", "checkerboard"])
@pytest.mark.parametrize("place", ["", "file/record.json"])
def test_a_file_that_cannot_be_written_is_said_first(folder, tmp_path, command, place, nothing_is_measured):
    (tmp_path / "file").write_text("x")
    target = {"accelerate": ["torch.nn:Identity"], "checkerboard": [folder]}.get(command, [])
    assert says(run(command, *target, "--json", tmp_path / place), "--json", "cannot be written")
    assert (tmp_path / "file").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_a_record_goes_to_what_is_no_file_too(folder):
    assert run("checkerboard", folder, "--json", "/dev/null").exit_code == 0
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("name", ["x.xyz", "picture", "x.gif", "x.pdf"])
def test_pictures_of_other_kinds(folder, tmp_path, name):
    before = list(tmp_path.iterdir())
    for command in ("sample", "checkerboard"):
        assert says(run(command, folder, "--out", tmp_path / name), name, "ends with .png, .jpg, .jpeg, .webp")
    if name != "x.gif":
        assert says(run("sample", folder, "--animate", "--out", tmp_path / name), "ends with .gif, .png, .webp")
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.WEBP"])
def test_kinds_of_pictures_that_there_are(folder, tmp_path, name):
    from PIL import Image

    for command in ("sample", "checkerboard"):
        result = run(command, folder, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / name) as image:
            assert image.format in ("PNG", "JPEG", "WEBP")


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_a_seed_that_is_too_large(folder, tmp_path, seed):
    assert says(run("sample", folder, f"--seed={seed}", "--out", tmp_path / "a.png"), "--seed must be from")
    assert says(run("checkerboard", folder, f"--seed={seed}"), "--seed must be from")
    assert says(run("accelerate", "torch.nn:Identity", f"--seed={seed}"), "--seed must be from")
    result = run("train", "sn_dcgan", "--data", "digits", f"--seed={seed}", "--out", tmp_path / "run")
    assert says(result, "seed must be from")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda:99", "cuda:-1", "tpu"])
def test_a_device_that_there_is_not(tmp_path, device):
    out = tmp_path / "run"
    assert says(run("train", "sn_dcgan", "--data", "digits", "--device", device, "--out", out), device)
    assert says(run("bench", "--device", device), device)
    assert says(run("verify", "--device", device), device)


@pytest.mark.parametrize(
    "command", [["info"], ["verify", "--quick"], ["bench", "--quick"], ["accelerate", "torch.nn:Identity"]]
)
def test_an_implementation_that_there_is_not_is_the_variable_s(monkeypatch, command):
    monkeypatch.setenv("GANKERN_IMPLEMENTATION", "refrence")
    assert says(run(*command), "GANKERN_IMPLEMENTATION is 'refrence'", "auto, reference, cpu")


def test_training_with_an_implementation_that_there_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("GANKERN_IMPLEMENTATION", "CPU")
    options = ["--data", "digits", "--width", 2, "--latent", 4, "--steps", 1, "--threads", 1]
    assert says(run("train", "sn_dcgan", *options, "--out", tmp_path / "run"), "GANKERN_IMPLEMENTATION is 'CPU'")


# ------------------------------------------------------------------------------------------------------------


def test_an_animation_survives_a_half_written_picture(folder, tmp_path):
    from PIL import Image

    shutil.copytree(folder, tmp_path / "run")
    frames = sorted((tmp_path / "run" / "samples").iterdir())
    assert len(frames) == 3
    frames[1].write_bytes(frames[1].read_bytes()[:300])
    result = run("sample", tmp_path / "run", "--animate", "--out", tmp_path / "a.gif")
    assert result.exit_code == 0, result.output
    assert "2 pictures" in result.output and "1 that cannot be read left out" in result.output
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 2
    for frame in frames:
        frame.write_bytes(b"")
    assert says(run("sample", tmp_path / "run", "--animate", "--out", tmp_path / "a.gif"), "none of 3 pictures")


def test_a_damaged_checkpoint_is_one_line_and_left_alone(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / training.CHECKPOINT
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert says(run("sample", tmp_path / "run", "--out", tmp_path / "a.png"), "or it is damaged")
    assert says(run("checkerboard", tmp_path / "run"), "or it is damaged")
    assert says(run("train", "--resume", "--out", tmp_path / "run", "--steps", 3), "or it is damaged")
    assert path.read_bytes() == content and not (tmp_path / "a.png").exists()


def test_a_run_that_died_before_its_first_checkpoint(folder, tmp_path):
    """It is resumed with its own options, or started anew."""
    out = tmp_path / "run"
    (out / "samples").mkdir(parents=True)
    shutil.copy(folder / "config.json", out)
    (out / "log.csv").write_text("")
    assert says(run("train", "--resume", "--out", out, "--lr", 0.5), "lr=0.001, not lr=0.5")
    result = run("train", "--resume", "--out", out, "--steps", 1)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "record.json").read_text())
    assert (record["config"]["width"], record["steps"]) == (2, 1)
    for name in ("checkpoint.pt", "record.json", "samples.png", "losses.png"):
        (out / name).unlink()
    for picture in (out / "samples").iterdir():
        picture.unlink()
    (out / "config.json").write_text("{")
    assert says(run("train", "--resume", "--out", out), "config.json is not a run's configuration")
    options = ["--data", "digits", "--width", 2, "--latent", 4, "--steps", 1, "--threads", 1]
    result = run("train", "sn_dcgan", *options, "--out", out)
    assert result.exit_code == 0, result.output


def test_a_broken_picture_is_left_out_where_that_is_asked(tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(pictures / f"{i}.png")
    (pictures / "9.png").write_bytes(b"no picture")
    options = ["--data", pictures, "--width", 2, "--latent", 4, "--batch-size", 4, "--steps", 1, "--threads", 1]
    out = tmp_path / "run"
    assert says(run("train", "sn_dcgan", *options, "--out", out), "9.png", "--on-error skip")
    result = run("train", "sn_dcgan", *options, "--out", out, "--on-error", "skip")
    assert result.exit_code == 0, result.output
    result = run("train", "--resume", "--out", out, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert says(run("train", "sn_dcgan", *options, "--out", out, "--on-error", "ignore"), "must be 'stop' or 'skip'")


# ------------------------------------------------------------------------------------------------------------


def record():
    contender = {"median": 1.0, "quartiles": [0.9, 1.1], "peak_bytes": 1000, "failure": None}
    result = {"primitive": "spectral_norm", "case": "a case", "mode": "forward", "dtype": "float32", "device": "cpu",
              "implementation": "cpu", "contenders": {"gankern": contender, "eager": contender}, "peer": "eager",
              "ratio": 1.0, "interval": [0.9, 1.1], "bytes": 100, "operations": 10, "limit": 0.5, "along": None}  # fmt: skip
    return {
        "environment": {"threads": 2},
        "settings": {"copy_bandwidth": 1e10, "multiply_add_rate": 1e11},
        "results": [result],
        "breakdowns": {"step": {"torch": {"rest": 1.0}}},
    }


def written(tmp_path, content, name="record.json"):
    (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / name


MALFORMED = {
    "results": ["x", {}, [3], [{}], None],
    "settings": [None, [], {"copy_bandwidth": "fast", "multiply_add_rate": 1}, {"copy_bandwidth": 0}],
    "environment": [None, 3],
    "breakdowns": [3, {"s": 1}, {"s": {"torch": {"rest": "x"}}}, {"s": {"torch": {"a": 1}, "gankern": {"b": 1}}}],
    "results/0/contenders": [None, {}, {"eager": {}}, {"gankern": {}}, {"gankern": 3}],
    "results/0/contenders/gankern/median": [None, "1", 0, -1, float("nan"), float("inf"), True, [1]],
    "results/0/contenders/gankern/quartiles": [None, 3, [1], ["a", "b"], [2.0, 1.0]],
    "results/0/contenders/eager/peak_bytes": ["x", float("nan")],
    "results/0/contenders/eager/colour": ["red"],
    "results/0/peer": ["nobody", 3],
    "results/0/ratio": [None, "2", 0, float("nan")],
    "results/0/interval": [None, [1], "ab", [0, 1]],
    "results/0/along": ["size", ["size"], ["size", "x"], [1, 2]],
    "results/0/mode": [None, 3, "", "a\nb", "x" * 1000],
    "results/0/primitive": [None, ["x"]],
    "results/0/bytes": ["many", -1, 10**400],
    "results/0/temperature": [3],
}


@pytest.mark.parametrize("where", MALFORMED)
def test_a_malformed_record_is_one_line(tmp_path, where, nothing_is_measured):
    for value in MALFORMED[where]:
        content = record()
        place = content
        *folders, name = where.split("/")
        for key in folders:
            place = place[int(key) if key.isdigit() else key]
        place[name] = value
        path = written(tmp_path, content)
        assert says(
            run("report", path, "--out", tmp_path / "out"), "record.json: is no record of `gankern bench --json`"
        )
        assert says(run("bench", "--quick", "--against", path), "record.json: is no record of `gankern bench --json`")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"3", b'{"results": [1'])
def test_what_is_no_json(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    assert says(run("report", tmp_path / "record.json"), "record.json: is no")


@pytest.mark.parametrize(
    "name", ["/../../../escaped", "../escaped", "..", "/etc/x", ".hidden", "a/b\\c", "$\\frac$", "[/red] {{ 7 * 7 }}"]
)
def test_a_record_writes_nowhere_but_into_out(tmp_path, name):
    content = record()
    content["results"][0] |= {"mode": name, "primitive": name, "case": name, "dtype": name}
    content["results"].append(content["results"][0] | {"along": [name, 2.0]})
    content["breakdowns"] = {name: {name: {name: 1.0}}}
    path = written(tmp_path, content)
    before = set(tmp_path.parent.rglob("*"))
    result = run("report", path, "--out", tmp_path / "a" / "b" / "out")
    assert result.exit_code == 0, result.output
    new = set(tmp_path.parent.rglob("*")) - before
    out = tmp_path / "a" / "b" / "out"
    assert new and all(out in [p, *p.parents] or p in out.parents for p in new)
    assert all(p.suffix in (".png", ".html") and not p.name.startswith(".") for p in out.iterdir())
    assert html.escape(name) in (out / "report.html").read_text()


def test_records_of_one_name_do_not_overwrite_each_other_s_pictures(tmp_path):
    paths = []
    for folder, ratio in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        content = record()
        content["results"][0] |= {"ratio": ratio, "interval": [ratio, ratio]}
        paths.append(written(tmp_path / folder, content))
    assert run("report", *paths, "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "record-roofline.png").is_file() and (
        tmp_path / "out" / "record-roofline-2.png"
    ).is_file()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_the_records_of_the_project_are_records(path):
    assert load(path).results


def test_the_marks_of_a_message_are_no_markup(folder, tmp_path):
    out = tmp_path / "a[red]b.png"
    result = run("sample", folder, "--out", out)
    assert result.exit_code == 0 and "a[red]b.png" in result.output


def test_the_program_has_no_traceback(tmp_path):
    """The whole program, not only what the commands return."""
    command = [sys.executable, "-m", "gankern.cli", "sample", str(tmp_path / "none"), "--out", "x.xyz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["accelerate", "checkerboard"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def make(:\n", "SyntaxError: invalid syntax (theirs.py, line 1)"),
        ("\nimport not_there_at_all\n", "No module named 'not_there_at_all' (theirs.py, line 2)"),
        ("\n\nundefined\n", "NameError: name 'undefined' is not defined (theirs.py, line 3)"),
        ("def make():\n    raise KeyError('width')\n", "theirs.py:make: KeyError: 'width' (theirs.py, line 2)"),
        (
            "from torch import nn\ndef make():\n    return nn.Linear(3)\n",
            "1 required positional argument: 'out_features' (theirs.py, line 3)",
        ),
        ("def make(width):\n    pass\n", "cannot be called without arguments (missing a required argument: 'width')"),
    ],
)
def test_what_somebody_s_file_raises_is_said_with_its_line(tmp_path, monkeypatch, command, code, words):
    (tmp_path / "theirs.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert says(run(command, "theirs.py:make"), words)


def test_files_that_there_are_not(tmp_path):
    path = tmp_path / "none.toml"
    for command in (("train", "dcgan", "--config", path), ("report", next(RESULTS.glob("*.json")), "--markdown", path)):
        assert says(run(*command), f"Error: {path}: No such file or directory")
