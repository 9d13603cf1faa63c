"""Every block of the README and of the docs that is Python runs as it is, and every command is one that gankern takes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from gankern import data, games, models, training
from gankern.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    for page in PAGES:
        text = page.read_text()
        for found in BLOCK.finditer(text):
            if found[1] == language:
                yield f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}", found[2]


def commands():
    """The gankern commands of all pages: in blocks, and in a line's `backticks` where they are whole commands."""
    for language in ("", "sh", "bash", "console"):
        for place, block in blocks(language):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                start = next((i + 1 for i, word in enumerate(words) if word in ("gankern", "gankern.cli")), None)
                if start is not None and words[0] in ("gankern", "python", "torchrun", "srun"):
                    yield f"{place} {' '.join(words)}", words[start:]


def mentions():
    """What stands in a text as `gankern ...`: a command, with some of its options."""
    for page in PAGES:
        for found in re.finditer(r"`gankern ([^`]*)`", page.read_text()):
            yield f"{page.relative_to(ROOT)} `gankern {found[1]}`", found[1].split()


COMMANDS = dict(commands())
MENTIONS = dict(mentions())
PYTHON = dict(blocks("python"))

# Each block has names of its own, in one process: torch is imported once.
SCRIPT = """
import json, sys, traceback
for place, block in json.load(open(sys.argv[1])).items():
    try:
        exec(compile(block, place, "exec"), {"__name__": "__main__"})
        failed = None
    except BaseException:
        failed = traceback.format_exc()
    print("\\n" + json.dumps([place, failed]), flush=True)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What went wrong in each Python block, or None."""
    folder = tmp_path_factory.mktemp("blocks")
    chosen = {place: block for place, block in PYTHON.items() if torch.cuda.is_available() or '"cuda"' not in block}
    (folder / "blocks.json").write_text(json.dumps(chosen))
    command = [sys.executable, "-c", SCRIPT, "blocks.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]
    assert done.returncode == 0 and len(lines) == len(chosen), done.stdout + done.stderr
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("place", PYTHON)
def test_python(ran, place):
    compile(PYTHON[place], place, "exec")
    if place not in ran:
        pytest.skip("needs a GPU")
    assert ran[place] is None, ran[place]


@pytest.fixture(scope="module")
def group():
    return typer.main.get_command(app)


@pytest.mark.parametrize("place", COMMANDS)
def test_command(group, place, trained, tmp_path, monkeypatch):
    """The command takes all of it; a run is configured, with its data, as far as the first step."""
    arguments = COMMANDS[place]
    with group.make_context("gankern", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, list(rest), parent=context).close()
    if name == "train" and not {"--resume", "--dry-run"} & set(arguments) and "cuda" not in arguments:
        asked = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(training, "train", lambda settings, *_: asked.append(settings))
        if "pictures" in arguments:
            make_pictures(tmp_path)
        if "--start-from" in arguments:
            stand_in(trained, arguments[arguments.index("--start-from") + 1])
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert asked[0].model == (arguments[1] if not arguments[1].startswith("-") else "wgan_gp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run for the commands that look at one: small, of both sets of layers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    images = data.load("digits")
    options = dict(width=4, latent=8, steps=1, batch_size=8, threads=1, compare=True)
    training.train(training.configure("wgan_gp", "digits", images, **options), images, folder)
    return folder


def played(name, folder):
    """A run of one step of a game, for commands that draw what only it has."""
    game, quick = games.find(name), {"gan_cls": {"options": {"encoder_steps": 1}}}.get(name, {})
    images = data.load(game.data, game.preset.get("size"))
    condition = None if game.needs is None else data.condition(game.data, images, game.needs)
    options = {"steps": 1, "batch_size": 8, "threads": 1, "evaluate": 0} | quick
    training.train(training.configure(name, game.data, images, condition, **options), images, folder, labels=condition)
    return folder


def make_pictures(place):
    """The folders of pictures that the docs speak of: pictures/, with a folder for each class, and fakes/."""
    levels = torch.randint(256, (40, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    for i, pixels in enumerate(levels):
        for path in (place / "pictures" / "ab"[i % 2] / f"{i}.png", place / "fakes" / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def stand_in(run, name):
    """The run under the name that a command calls it by."""
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).symlink_to(run, target_is_directory=True)


LOOKING = {place: words for place, words in COMMANDS.items() if words[0] in ("sample", "evaluate", "export")}


@pytest.mark.parametrize("place", LOOKING)
def test_a_command_that_looks_at_a_run(trained, place, tmp_path, monkeypatch):
    """It runs to its end, on a small run of that name, with fewer samples."""
    monkeypatch.chdir(tmp_path)
    arguments = ["20" if word.isdigit() and int(word) > 100 else word for word in LOOKING[place]]
    if "pictures" in arguments:
        make_pictures(tmp_path)
    runs = [Path(word) for word in arguments[1:] if word.startswith("runs/")]
    for run in runs:
        game = run.name.partition("-")[0]
        is_game = game in games.names() and game not in models.MODELS
        stand_in(played(game, tmp_path / "played") if is_game else trained, run)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("place", MENTIONS)
def test_mention(group, place):
    first, *words = MENTIONS[place]
    known = {option for parameter in group.params for option in parameter.opts} | {"--help"}
    if not first.startswith("-"):
        with group.make_context("gankern", [first]) as context:
            command = group.resolve_command(context, [first])[1]
        known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts} | known
    options = [word for word in (first, *words) if word.startswith("-")]
    assert [option for option in options if option.partition("=")[0] not in known] == []


def test_there_are_some():
    assert len(PYTHON) > 20 and len(COMMANDS) > 25 and len(MENTIONS) > 20
