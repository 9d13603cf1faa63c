"""MkDocs' hook: a page for each command and for each part of the API, made when the site is built.

The commands' pages say what `gankern COMMAND --help` says, from the same declarations; the API's pages are its
docstrings.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The public parts of the package, by title.
API = {
    "gankern": [
        "gankern.acceleration",
        "gankern.core.double_backward",
        "gankern.core.memory",
        "gankern.core.precision",
    ],
    "functional": ["gankern.functional"],
    "nn": ["gankern.nn", "gankern.nn.utils", "gankern.nn.init"],
    "penalties": ["gankern.penalties"],
    "losses": ["gankern.losses"],
    "models": ["gankern.models"],
    "data": ["gankern.data"],
    "metrics": ["gankern.metrics"],
    "games": ["gankern.games"],
    "training": ["gankern.training"],
    "diagnostics": ["gankern.diagnostics"],
    "theory": ["gankern.theory"],
}


def on_config(config: Any) -> Any:
    from gankern.cli import COMMANDS

    config.nav += [
        {"Commands": [{name: f"commands/{name}.md"} for name in COMMANDS]},
        {"API": [{title: f"api/{title}.md"} for title in API]},
    ]
    listed = re.findall(r"[\w/]+\.md", str(config.nav))
    others = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in listed]
    if others:
        config.nav.append({"More": [page.name for page in others]})
    # What lies in a folder of pages of its own is listed by its files.
    for folder, title in (("models", "Models, one by one"), ("games", "Games, one by one")):
        pages = sorted((ROOT / "docs" / folder).glob("*.md"))
        if pages:
            config.nav.append({title: [{page.stem: f"{folder}/{page.name}"} for page in pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    from gankern.cli import COMMANDS

    pages = {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    pages |= {f"api/{title}.md": api_page(title, modules) for title, modules in API.items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files of the repository that are no pages stay words."""
    return re.sub(
        r"\[([^\]]+)\]\((?:\.\./)+(?:README|CONTRIBUTING|CHANGELOG|LICENSE|benchmarks/)[^)]*\)", r"\1", markdown
    )


def command_page(name: str) -> str:
    """A command's page, in Markdown."""
    import typer

    from gankern.cli import COMMANDS, app

    group = typer.main.get_command(app)
    with group.make_context("gankern", [name]) as context:
        command = group.resolve_command(context, [name])[1]
    arguments = [p for p in command.params if p.param_type_name == "argument" and not p.hidden]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    usage = " ".join(["gankern", name, *(_shown(a) for a in arguments), "[OPTIONS]"])
    help_text = re.sub(r"\n[ ]+", "\n", command.help or "")
    lines = [f"# gankern {name}", "", COMMANDS[name], "", f"```text\n{usage}\n```", "", _escaped(help_text), ""]
    if arguments:
        lines += ["| argument | what |", "|---|---|"]
        lines += [f"| `{_cell(_shown(a))}` | {_cell(getattr(a, 'help', '') or '')} |" for a in arguments]
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for panel, members in panels.items():
        lines += ["", f"## {panel}", "", "| option | default | what |", "|---|---|---|"]
        for option in members:
            names = ", ".join(f"`{text}`" for text in (*option.opts, *option.secondary_opts))
            metavar = "" if option.is_flag else f" `{_cell(_shown(option))}`"
            lines.append(f"| {names}{metavar} | {_default(option)} | {_cell(option.help or '')} |")
    return "\n".join([*lines, ""])


def _shown(parameter: Any) -> str:
    """What stands for a parameter's value."""
    return str(parameter.metavar or parameter.name.upper())


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return _cell(option.show_default)
    value = option.default
    if option.is_flag:
        return "on" if value else "off"
    return "" if value is None or callable(value) else _cell(str(value))


def _cell(text: str) -> str:
    return _escaped(" ".join(text.split())).replace("|", "\\|")


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;")


def api_page(title: str, modules: list[str]) -> str:
    """A page of docstrings: of the names that a module says are public."""
    from importlib import import_module

    lines = [f"# {title if title == 'gankern' else f'gankern.{title}'}", ""]
    for module in modules:
        found = import_module(module)
        public = [name for name in getattr(found, "__all__", vars(found)) if not name.startswith("_")]
        lines += [(found.__doc__ or "").partition("\n")[0], ""]
        for name in public:
            thing = getattr(found, name)
            home = getattr(thing, "__module__", None)
            if not (callable(thing) and isinstance(home, str) and home.startswith("gankern")):
                continue
            lines += [f"::: {home}.{thing.__qualname__}", ""] if "<" not in thing.__qualname__ else []
    return "\n".join(lines)
