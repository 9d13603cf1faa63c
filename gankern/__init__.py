"""gankern: compiled kernels for the primitives of generative adversarial networks.

``gankern.functional`` has one function a primitive, ``gankern.nn`` the modules, and the command ``gankern info``
says what runs on this machine and what does not, with the reasons.
"""

from gankern.dispatch import last_implementation, use_implementation
from gankern.double_backward import fast_double_backward
from gankern.memory import keep_freed_memory
from gankern.precision import convolution_precision, get_convolution_precision, set_convolution_precision
from gankern.version import __version__

__all__ = [
    "__version__",
    "accelerate",
    "convolution_precision",
    "fast_double_backward",
    "get_convolution_precision",
    "keep_freed_memory",
    "last_implementation",
    "replace_upsampling",
    "restore",
    "set_convolution_precision",
    "use_implementation",
]


def __getattr__(name: str):
    """What needs the layers is imported when it is asked for."""
    if name == "replace_upsampling":
        from gankern.replacement import replace_upsampling

        return replace_upsampling
    if name in ("accelerate", "restore"):
        from gankern import acceleration

        return getattr(acceleration, name)
    raise AttributeError(f"module 'gankern' has no attribute {name!r}")
