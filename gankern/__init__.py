"""gankern: compiled kernels for the primitives of generative adversarial networks.

``gankern.functional`` has one function a primitive, ``gankern.nn`` the modules, and the command ``gankern info``
says what runs on this machine and what does not, with the reasons.
"""

from gankern.core.dispatch import last_implementation, use_implementation
from gankern.core.double_backward import fast_double_backward
from gankern.core.memory import keep_freed_memory
from gankern.core.precision import convolution_precision, get_convolution_precision, set_convolution_precision

__version__ = "0.1.0"

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
        from gankern.acceleration.upsampling import replace_upsampling

        return replace_upsampling
    if name in ("accelerate", "restore"):
        from gankern import acceleration

        return getattr(acceleration, name)
    raise AttributeError(f"module 'gankern' has no attribute {name!r}")
