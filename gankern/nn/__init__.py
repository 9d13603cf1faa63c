"""Modules with torch.nn's names, argument order, defaults and state_dict keys."""

from gankern.nn import utils

__all__ = ["utils"]
