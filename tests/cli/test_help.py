"""What the command line says of itself: its list of commands in a moment, every option with its choices and default."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from gankern import __version__, losses, training
from gankern.cli import COMMANDS, PANELS, app

GROUP = typer.main.get_command(app)


def command(name):
    with GROUP.make_context("gankern", [name]) as context:
        return GROUP.resolve_command(context, [name])[1]


def shown(*arguments, width="80"):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": width, "TERMINAL_WIDTH": width})
    assert result.exit_code == 0, result.output
    return result.output


def words(text):
    """A help page as running text, without boxes and line ends."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def test_every_command_is_listed_once():
    assert sorted(COMMANDS) == sorted(name for names in PANELS.values() for name in names)
    page = words(shown("--help"))
    for name, sentence in COMMANDS.items():
        assert f"{name} {sentence}" in page
    assert "Exit codes: 0 done, 1 it failed" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_help(name):
    page = shown(name, "--help")
    assert page == shown(name, "-h")
    assert max(map(len, page.splitlines())) <= 80
    for option in command(name).params:
        assert "[" not in (getattr(option, "help", None) or ""), f"{option.name}: rich takes [...] for markup"
        if option.name != "help" and not option.hidden:
            shown_as = getattr(option, "metavar", None) if option.param_type_name == "argument" else None
            assert (shown_as or max(option.opts, key=len)[:14]).lower() in page.lower(), option.opts


def test_defaults_are_shown():
    page = words(shown("train", "--help"))
    for default in (
        "(torch's)",
        "(runs/MODEL-DATA, or the next of that name)",
        "(200, or the model's own)",
        "(fp32)",
        "(the data's)",
    ):
        assert f"[default: {default}]" in page, default
    assert "[default: (all)]" in words(shown("verify", "--help"))
    assert "[default: (one of each in turn)]" in words(shown("sample", "--help"))
    assert "[default: 64]" in words(shown("checkerboard", "--help"))


def test_choices_are_shown():
    page = words(shown("train", "--help"))
    for choices in ("torch|gankern", "adam|rmsprop", "fp32|bf16|fp16", "local|global", "stop|skip", "batch|virtual"):
        assert choices in page, choices
    for name in (*losses.LOSSES, "projection", "concatenation", "none"):
        assert name in page, name
    assert "cpu|cuda" in shown("verify", "--help") and "fp64" in shown("bench", "--help")


def test_every_option_of_a_run_is_an_option_of_the_command():
    own = {option.name for option in command("train").params}
    left = {field.name for field in fields(training.Config)} - own
    assert left == {"channels", "num_classes", "options"}  # the data's, and --option's


def test_version():
    for arguments in (["--version"], ["--version", "train"]):
        assert shown(*arguments) == f"gankern {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", {"train"}),
        ("train sn_d", {"sn_dcgan"}),
        ("train --layers ", {"torch", "gankern"}),
        ("train --loss h", {"hinge"}),
        ("train --data dig", {"digits"}),
        ("bench --precision bf", {"bf16"}),
        ("verify --op pixel", {"pixel_norm"}),
        ("verify --qu", {"--quick"}),
        ("sample --layers g", {"gankern"}),
    ],
)
def test_completion(typed, offered, monkeypatch, capsys):
    monkeypatch.setenv("_GANKERN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"gankern {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" "))))
    with pytest.raises(SystemExit):
        app(prog_name="gankern")
    assert set(capsys.readouterr().out.split()) == offered


WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
from gankern.cli import app
for arguments in (["--help"], ["--version"], ["nothing"]):
    CliRunner().invoke(app, arguments)
print(*sorted({"torch", "numpy"} & set(sys.modules)))
"""


def test_the_list_of_commands_takes_a_moment():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr
    took = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "gankern", "--help"], capture_output=True, check=True)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(took) < 0.5, took


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "Usage"),
        (["trian"], 2, "train"),
        (["train", "--no-such-option"], 2, "No such option"),
        (["train", "sndcgan", "--data", "digits"], 2, "did you mean sn_dcgan"),
        (["train", "sn_dcgan", "--data", "digits", "--loss", "hing"], 2, "did you mean hinge"),
        (["train", "sn_dcgan", "--data", "digits", "--batch-size", "0"], 2, "batch_size"),
        (["train", "sn_dcgan", "--data", "digits", "-o", "x"], 2, "NAME=VALUE"),
        (["train", "--resume", "--out", "nowhere"], 1, "there is no checkpoint"),
        (["train", "--config", "nowhere.toml"], 1, "nowhere.toml"),
        (["verify", "--op", "pixel_nrom"], 2, "did you mean pixel_norm"),
        (["bench", "--model", "dcgn"], 2, "did you mean dcgan"),
        (["bench", "--quick", "--full"], 2, "exclude each other"),
        (["sample", "nowhere"], 1, "nowhere"),
        (["sample", "nowhere", "--out", "x.xyz"], 2, "ends with"),
        (["accelerate", "nothing"], 2, "FILE:NAME"),
        (["accelerate", "torch.nn:Identity", "--input", "a"], 2, "--input"),
        (["accelerate", "nowhere.py:x"], 1, "there is no file"),
        (["checkerboard", "nothing"], 2, "neither a file"),
        (["report", "nowhere.json"], 1, "nowhere.json"),
    ],
)
def test_exit_codes(arguments, code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert says in result.output
    assert not list(tmp_path.iterdir())


def test_info_on_another_python(monkeypatch):
    """The wheel serves every Python; the module with the build's facts is for one."""
    import sys

    import gankern
    from gankern.cli import info
    from gankern.core.native import NATIVE_MISSING

    if NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    monkeypatch.delattr(gankern, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "gankern._C", None)
    assert info.native() == "loaded; its facts are for another Python"
