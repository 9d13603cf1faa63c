"""Models that a command is told about by name."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def split(target: str) -> tuple[str, str]:
    """``where:name`` as (where, name)."""
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"{target!r} is not FILE:NAME or PACKAGE:NAME (for instance my_model.py:Generator)")
    return where, name


def make(target: str) -> nn.Module:
    """The model of ``file.py:name`` or ``package.module:name``, where the name is a module's, or that of what makes one
    when it is called without arguments.

    Raises: ValueError, TypeError, OSError, saying what is missing; ImportError, with what its own code raised.
    """
    where, name = split(target)
    found: object = _import(where)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(found).items() if isinstance(v, type) and issubclass(v, nn.Module)]
            listed = f"; its modules are {', '.join(names)}" if names else ""
            raise ValueError(f"{where} has no {name!r}{listed}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise TypeError(f"{target} is a {type(found).__name__}; it must be a torch.nn.Module, or make one")
    try:
        inspect.signature(found).bind()
    except ValueError:
        pass  # of a builtin
    except TypeError as error:
        raise TypeError(
            f"{target} cannot be called without arguments ({error}): name a function that makes the model, such as "
            f"def make(): return {name}(...)"
        ) from error
    made = _run(target, found)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{target} makes a {type(made).__name__}; it must make a torch.nn.Module")
    return made


def _import(where: str) -> ModuleType:
    path = Path(where)
    if path.suffix != ".py":
        sys.path.insert(0, "")  # as python -m does
        return _run(where, importlib.import_module, where)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {where}")
    sys.path.insert(0, str(path.parent.resolve()))  # as python does for the file it runs
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # for what looks itself up there: dataclasses, pickle
    _run(where, spec.loader.exec_module, module)
    return module


def _run(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs somebody else's code; an ImportError says in a line what it raised, and in which line of whose file."""
    try:
        return function(*arguments)
    except Exception as error:  # anything may come
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in f.filename]
        own = [f for f in frames if f.filename == what.rpartition(":")[0] or f.filename == what] or frames
        if own and not isinstance(error, SyntaxError):  # which says it
            said += f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"
        raise ImportError(f"{what}: {said}") from error
