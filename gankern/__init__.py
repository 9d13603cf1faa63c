"""gankern: compiled kernels for the primitives of generative adversarial networks.

``gankern.functional`` has one function a primitive, ``gankern.nn`` the modules, and the command ``gankern info``
says what runs on this machine and what does not, with the reasons.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gankern.core.dispatch import last_implementation, use_implementation
from gankern.core.double_backward import fast_double_backward
from gankern.core.memory import keep_freed_memory
from gankern.core.precision import convolution_precision, get_convolution_precision, set_convolution_precision

if TYPE_CHECKING:
    from gankern import data, diagnostics, filters, functional, losses, metrics, models, nn, penalties, training
    from gankern.acceleration import accelerate, restore
    from gankern.acceleration.upsampling import replace_upsampling

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
    "get_convolution_precision",
    "keep_freed_memory",
    "last_implementation",
    "losses",
    "metrics",
    "models",
    "nn",
    "penalties",
    "replace_upsampling",
    "restore",
    "set_convolution_precision",
    "training",
    "use_implementation",
]

# What needs the layers, or a floor of its own, is imported when it is asked for: name -> module that has it.
_LAZY = {
    "accelerate": "gankern.acceleration",
    "restore": "gankern.acceleration",
    "replace_upsampling": "gankern.acceleration.upsampling",
}
_MODULES = frozenset(
    ("data", "diagnostics", "filters", "functional", "losses", "metrics", "models", "nn", "penalties", "training")
)

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"gankern.{name}")
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        raise AttributeError(f"module 'gankern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
