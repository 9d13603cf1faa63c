"""Modules with torch.nn's names, argument order, defaults and state_dict keys."""

from gankern.nn import utils
from gankern.nn.modules.minibatch_discrimination import MinibatchDiscrimination

__all__ = ["MinibatchDiscrimination", "utils"]
