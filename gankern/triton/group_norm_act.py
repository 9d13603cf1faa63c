"""Group normalisation and a (leaky) ReLU: the kernels of batch normalisation on one sample of N C channels, with
statistics of C / groups neighbouring ones.

Formulas and split: gankern/triton/batch_norm_act.py. Gradients of affine values that the samples have in common are
N C values, which a small kernel sums up over the samples (gankern/triton/sums.py).
"""

import torch
from torch import Tensor

from gankern.triton.batch_norm_act import Affine, _Call
from gankern.triton.launch import planned, sum_dtype


def _members(x: Tensor, groups: int) -> int:
    return x.shape[1] // groups if groups else 1


@planned
def forward(
    x: Tensor, weight: Affine, bias: Affine, groups: int, eps: float, negative_slope: float, slope: Affine = None
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics [3, N, groups]. Launches: 3, or 1."""
    call = _Call(x, weight, bias, negative_slope, instances=True, slopes=slope, members=_members(x, groups))
    y = torch.empty_like(call.x)
    shape = 3, x.shape[0], groups
    if call.count == 0 or call.channels == 0:
        return y, x.new_zeros(shape, dtype=call.sum)
    return y, call.forward(eps, y, shape)


@planned
def backward(
    grad: Tensor, x: Tensor, weight: Affine, bias: Affine, stats: Tensor, groups: int, negative_slope: float,
    affine: bool, slope: Affine = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight, bias and slope (empty where not wanted, or there is none). Launches: 3, or 1, and one
    for each gradient that is summed up over the samples."""
    call = _Call(x, weight, bias, negative_slope, instances=True, slopes=slope, members=_members(x, groups))
    return call.backward(grad, stats, True, affine)


@planned
def double_backward(
    grad_grad_x: Tensor | None, grad_grad_weight: Affine, grad_grad_bias: Affine, grad: Tensor, x: Tensor,
    weight: Affine, bias: Affine, stats: Tensor, groups: int, negative_slope: float, affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `backward`'s grad, x and weight (empty where there are none). Launches: 3, or 1, and one for
    a weight's that is summed up over the samples."""
    call = _Call(
        x, weight, bias, negative_slope, (grad_grad_weight, grad_grad_bias), instances=True, members=_members(x, groups)
    )
    return call.double_backward(grad_grad_x, grad, stats, True, affine)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels: a channel has two ranges, or one, or programs take turns."""
    vector = torch.empty(32, dtype=sum_dtype(dtype), device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(4, 32, 192, 192, dtype=dtype, device=device).contiguous(memory_format=layout)
        options = 8, 0.2, True
        y, stats = forward(x, vector, vector, 8, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        forward(x, vector, vector, 8, 1e-5, 0.0, vector)
        backward(y, x, vector, vector, stats, *options, vector)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
        x = torch.empty(4, 32, 16, 16, dtype=dtype, device=device).contiguous(memory_format=layout)
        y, stats = forward(x, vector, vector, 8, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        x = torch.empty(64, 256, 64, 64, dtype=dtype, device=device, memory_format=layout)
        affine = vector.new_empty(x.shape[1])
        y, stats = forward(x, affine, affine, 32, 1e-5, 0.2)
        backward(y, x, affine, affine, stats, 32, 0.2, True)
