"""gankern: compiled kernels for the primitives of generative adversarial networks.

``gankern.functional`` has one function a primitive, ``gankern.nn`` the modules, and the command ``gankern info``
says what runs on this machine and what does not, with the reasons.
"""

from gankern.dispatch import last_implementation, use_implementation
from gankern.double_backward import fast_double_backward
from gankern.memory import keep_freed_memory
from gankern.version import __version__

__all__ = ["__version__", "fast_double_backward", "keep_freed_memory", "last_implementation", "use_implementation"]
