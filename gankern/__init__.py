"""gankern: compiled kernels for the primitives of generative adversarial networks.

``gankern.functional`` has one function a primitive, ``gankern.nn`` the modules, and the command ``gankern info``
says what runs on this machine and what does not, with the reasons.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gankern import data, diagnostics, functional, games, losses, metrics, models, nn, penalties, theory, training
    from gankern.acceleration import accelerate, restore
    from gankern.acceleration.upsampling import replace_upsampling
    from gankern.core.dispatch import last_implementation, use_implementation
    from gankern.core.double_backward import fast_double_backward
    from gankern.core.memory import keep_freed_memory
    from gankern.core.precision import convolution_precision, get_convolution_precision, set_convolution_precision
    from gankern.functional import filters
    from gankern.training import load_generator

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "accelerate",
    "convolution_precision",
    "data",
    "diagnostics",
    "fast_double_backward",
    "filters",
    "functional",
    "games",
    "get_convolution_precision",
    "keep_freed_memory",
    "last_implementation",
    "load_generator",
    "losses",
    "metrics",
    "models",
    "nn",
    "penalties",
    "replace_upsampling",
    "restore",
    "set_convolution_precision",
    "theory",
    "training",
    "use_implementation",
]

# Everything is imported when it is asked for, and torch with it: the command line can list what it has in a moment.
# Name -> module that has it.
_LAZY = {
    "accelerate": "gankern.acceleration",
    "convolution_precision": "gankern.core.precision",
    "fast_double_backward": "gankern.core.double_backward",
    "get_convolution_precision": "gankern.core.precision",
    "keep_freed_memory": "gankern.core.memory",
    "last_implementation": "gankern.core.dispatch",
    "load_generator": "gankern.training",
    "replace_upsampling": "gankern.acceleration.upsampling",
    "restore": "gankern.acceleration",
    "set_convolution_precision": "gankern.core.precision",
    "use_implementation": "gankern.core.dispatch",
}
_MODULES = frozenset(
    (
        "core",
        "data",
        "diagnostics",
        "filters",
        "functional",
        "games",
        "losses",
        "metrics",
        "models",
        "nn",
        "penalties",
        "theory",
        "training",
    )
)

# Name -> the module that is at home elsewhere and can be imported by that name too.
_AT_HOME = {"gankern.filters": "gankern.functional.filters"}


class _Elsewhere(MetaPathFinder, Loader):
    """Imports a module of ``_AT_HOME`` by its public name: the very module, and only when it is asked for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _AT_HOME else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(_AT_HOME[module.__name__])


sys.meta_path.insert(0, _Elsewhere())

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"gankern.{name}")
        if name in _LAZY:
            found = globals()[name] = getattr(import_module(_LAZY[name]), name)
            return found
        raise AttributeError(f"module 'gankern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_MODULES, *__all__})
