"""The GPU's tests compare bits: that comparison itself needs no GPU."""

import pytest
import torch


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(-0.0),
        torch.tensor([float("nan"), 1.0]).bfloat16(),
        torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.rand(3, 4, dtype=torch.float64).T,
        torch.rand(1).expand(3),
        torch.zeros(0, 3),
    ],
    ids=["scalar", "nan", "channels_last", "transposed", "expanded", "empty"],
)
def test_same_and_other_bits(x, same_bits):
    same_bits([x], [x.clone()])
    same_bits([x], [x.contiguous()])  # other strides, the same values
    if x.numel():
        other = x.clone()
        other[(0,) * x.ndim] = 0.0 if x.ndim == 0 else 7.0
        with pytest.raises(AssertionError):
            same_bits([x], [other])
    with pytest.raises(AssertionError):
        same_bits([x], [x.float().double() if x.dtype != torch.float64 else x.float()])
