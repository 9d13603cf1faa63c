"""gankern: compiled kernels for the primitives of generative adversarial networks.

``gankern.functional`` has one function a primitive, ``gankern.nn`` the modules, and the command ``gankern info``
says what runs on this machine and what does not, with the reasons.
"""

from gankern.dispatch import last_implementation, use_implementation
from gankern.version import __version__


__all__ = ["__version__", "last_implementation", "use_implementation"]
