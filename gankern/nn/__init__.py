"""Modules with torch.nn's names, argument order, defaults and state_dict keys."""

from gankern.nn import utils
from gankern.nn.modules.activation import BiasAct, BiasActPixelNorm, LeakyReLU, PixelNorm, ReLU
from gankern.nn.modules.minibatch_discrimination import MinibatchDiscrimination

__all__ = ["BiasAct", "BiasActPixelNorm", "LeakyReLU", "MinibatchDiscrimination", "PixelNorm", "ReLU", "utils"]
