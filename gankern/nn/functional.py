"""torch.nn.functional with gankern's functions: :mod:`gankern.functional` by the name that torch has for it."""

import sys

import gankern.functional
from gankern.functional import *  # noqa: F403 (for editors and type checkers)

sys.modules[__name__] = gankern.functional
