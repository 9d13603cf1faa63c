"""Modules that stand in for torch's of the same name: whatever they do not define themselves is torch's own.

Such a module ends with a call of :func:`stand_in`. A star import of torch's at its top would do most of that, but it
puts torch's submodules where Python then looks for the stand-in's own; so the star import is there for type checkers
and editors only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any


def public_names(module: ModuleType) -> list[str]:
    """What is meant to be used of a module of torch.nn's: its ``__all__``, or else every public name that is not an
    import of another library.

    >>> import torch
    >>> "relu" in public_names(torch.nn.functional), "np" in public_names(torch.nn.functional)
    (True, False)
    """
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)

    def belongs(value: Any) -> bool:
        return not isinstance(value, ModuleType) or value.__name__.startswith("torch.nn.")

    return [name for name, value in vars(module).items() if not name.startswith("_") and belongs(value)]


def stand_in(
    name: str, original: ModuleType, own: Iterable[str] = (), submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Gives the module ``name`` every public name of ``original`` that it does not have, and returns its
    ``__getattr__`` (for private names, and submodules that are imported later), ``__dir__`` and ``__all__``.

    ``own`` are the names that it has in place of and beside the original's. ``submodules`` are torch's that can also be
    imported as the stand-in's: ``import gankern.nn.utils.parametrize`` gives torch's one, state included.
    """
    public = public_names(original)
    for attribute in public:
        vars(sys.modules[name]).setdefault(attribute, getattr(original, attribute))
    for submodule in submodules:
        full = f"{original.__name__}.{submodule}"
        importlib.import_module(full)
        for loaded, module in list(sys.modules.items()):  # itself and, of a package, its parts
            if loaded == full or loaded.startswith(f"{full}."):
                sys.modules[name + loaded.removeprefix(original.__name__)] = module

    def get(attribute: str) -> Any:
        try:
            return getattr(original, attribute)
        except AttributeError:
            message = f"neither module {name!r} nor {original.__name__!r} has the attribute {attribute!r}"
            raise AttributeError(message, name=attribute, obj=sys.modules[name]) from None

    def names() -> list[str]:
        return sorted({*vars(sys.modules[name]), *dir(original)})

    return get, names, sorted({*public, *own})


def stand_ins(name: str, original: ModuleType, own: Iterable[str]) -> None:
    """Makes every submodule of ``original``, a package of torch's that has imported all of them, a submodule of the
    package ``name`` too: torch's own, or where one of the names in ``own`` is at home in it, one that has the package's
    in its place.

    >>> import gankern.nn.modules
    >>> from gankern.nn.modules.conv import Conv1d, Conv2d
    >>> Conv1d.__module__, Conv2d.__module__
    ('torch.nn.modules.conv', 'gankern.nn.modules.convolution')
    """
    package = sys.modules[name]
    for loaded, module in list(sys.modules.items()):
        if loaded.rpartition(".")[0] != original.__name__:
            continue
        short = loaded.rpartition(".")[2]
        full = f"{name}.{short}"
        if full in sys.modules:  # a file of the package's own
            continue
        found = [n for n in own if getattr(vars(module).get(n), "__module__", None) == loaded]
        if found:
            module, theirs = ModuleType(full, f"{loaded} with gankern's {', '.join(found)}."), module
            sys.modules[full] = module
            vars(module).update({n: getattr(package, n) for n in found})
            vars(module).update(zip(("__getattr__", "__dir__", "__all__"), stand_in(full, theirs, found)))
        sys.modules[full] = module
        setattr(package, short, module)


def former(name: str, submodule: str, classes: Iterable[type]) -> None:
    """Lets classes be found in a submodule of the package ``name`` where they once were: by imports, and by pickles of
    whole modules, which name the file of each class. Beside a submodule that stands in for torch's they join it.

    >>> from gankern.nn.modules.activation import PixelNorm
    >>> PixelNorm.__module__
    'gankern.nn.modules.pixel_norm'
    """
    full = f"{name}.{submodule}"
    module = sys.modules.setdefault(full, ModuleType(full, "Classes of gankern's that were once here."))
    setattr(sys.modules[name], submodule, module)
    vars(module).update({cls.__name__: cls for cls in classes})
