"""Instance normalisation and a (leaky) ReLU: the kernels of batch normalisation on one sample of N C channels.

Formulas and split: gankern/triton/batch_norm_act.py. Affine values that the samples have in common are repeated for
each of them, and their gradients summed over them: N C values.
"""

import torch
from torch import Tensor

from gankern.triton.batch_norm_act import _Call
from gankern.triton.launch import sum_dtype


def _of_instances(values: Tensor | None, x: Tensor) -> Tensor | None:
    """[C] or [N, C] as [N C]."""
    return None if values is None else values.expand(x.shape[:2]).reshape(-1)


def _gradient_of(values: Tensor | None, every: Tensor, wanted: bool) -> Tensor:
    """Of values [C] or [N, C], by those of [N C]; empty where there is none."""
    if values is None or not wanted:
        return every.new_empty(0)
    return every.view(values.shape) if values.ndim == 2 else every.view(-1, values.shape[0]).sum(0)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics [3, N, C]. Launches: 3."""
    weight, bias, slope = (_of_instances(v, x) for v in (weight, bias, slope))
    call = _Call(x, weight, bias, negative_slope, instances=True, slopes=slope)
    y = torch.empty_like(call.x)
    stats = call.moments(eps) if x.numel() else x.new_zeros((3, call.channels), dtype=call.sum)
    if x.numel():
        call.apply("forward", None, None, None, None, stats, None, y, None)
    return y, stats.view(3, *x.shape[:2])


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
    """The gradients of x, weight, bias and slope (empty where not wanted, or there is none). Launches: 3."""
    every = _of_instances(slope, x)
    call = _Call(x, _of_instances(weight, x), _of_instances(bias, x), negative_slope, instances=True, slopes=every)
    grad, stats = call.like_x(grad), stats.reshape(3, -1)
    grad_x = torch.empty_like(call.x)
    to_weight, to_bias, to_slope = (x.new_zeros(call.channels, dtype=call.sum) for _ in range(3))
    if x.numel():
        of_slope = None if slope is None else to_slope
        terms = call.terms("backward", grad, None, None, stats, True, to_weight, to_bias, of_slope)
        call.apply("backward", grad, None, None, None, stats, terms, grad_x, None)
    of_affine = _gradient_of(weight, to_weight, affine), _gradient_of(bias, to_bias, affine)
    return grad_x, *of_affine, _gradient_of(slope, to_slope, True)


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
    """The gradients of `backward`'s grad, x and weight (empty where there are none). Launches: 3."""
    call = _Call(x, _of_instances(weight, x), _of_instances(bias, x), negative_slope, instances=True)
    grad, h, stats = call.like_x(grad), call.like_x(grad_grad_x), stats.reshape(3, -1)
    h_weight, h_bias = (call.affine(_of_instances(v, x), 0) for v in (grad_grad_weight, grad_grad_bias))
    grad_grad, grad_x = torch.empty_like(call.x), torch.empty_like(call.x)
    to_weight = x.new_zeros(call.channels, dtype=call.sum)
    if x.numel():
        terms = call.terms("double_backward", grad, h, h_weight, stats, True, to_weight, None)
        call.apply("double_backward", grad, h, h_weight, h_bias, stats, terms, grad_grad, grad_x)
    if grad_grad_x is None and grad_grad_weight is None:
        grad_x = x.new_empty(0)
    return grad_grad, grad_x, _gradient_of(weight, to_weight, affine and grad_grad_x is not None)


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
