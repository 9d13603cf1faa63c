import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """Convolutions, torch's and the engine's: those that give a feature map (forward or data gradient), and weight
    gradients."""

    def __init__(self):
        super().__init__()
        self.maps = self.weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.convolution.default, torch.ops.gankern.convolution_row.default):
            self.maps += 1
        if func is torch.ops.gankern.convolution_row_weight_gradient.default:
            self.weights += 1
        if func is torch.ops.aten.convolution_backward.default:
            mask = args[10]
            self.maps += mask[0]
            self.weights += mask[1]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count_convolutions():
    """A mode that counts them: ``with count_convolutions as count: ...; count.maps, count.weights``."""
    return Count()
