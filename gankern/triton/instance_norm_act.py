"""Instance normalisation and a (leaky) ReLU: group normalisation of as many groups as channels
(gankern/triton/group_norm_act.py)."""

import torch
from torch import Tensor

from gankern.triton import group_norm_act
from gankern.triton.launch import sum_dtype


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics [3, N, C]."""
    return group_norm_act.forward(x, weight, bias, x.shape[1], eps, negative_slope, slope)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    negative_slope: float,
    affine: bool,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and slope (empty where not wanted, or there is none)."""
    return group_norm_act.backward(grad, x, weight, bias, stats, x.shape[1], negative_slope, affine, slope)


def double_backward(
    grad_grad_x: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    negative_slope: float,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `backward`'s grad, x and weight (empty where there are none)."""
    of_affine = grad_grad_weight, grad_grad_bias
    tensors = grad_grad_x, *of_affine, grad, x, weight, bias, stats
    return group_norm_act.double_backward(*tensors, x.shape[1], negative_slope, affine)


def examples(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Calls that launch every form of the kernels."""
    vector = torch.empty(32, dtype=sum_dtype(dtype), device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(4, 32, 64, 64, dtype=dtype, device=device).contiguous(memory_format=layout)
        options = 0.2, True
        y, stats = forward(x, vector, vector, 1e-5, 0.2)
        backward(y, x, vector, vector, stats, *options)
        forward(x, vector, vector, 1e-5, 0.0, vector)
        backward(y, x, vector, vector, stats, *options, vector)
        double_backward(y, vector, vector, y, x, vector, vector, stats, *options)
