"""Points between samples, in one launch for each order.

Formula (Gulrajani et al. 2017, arXiv 1704.00028, algorithm 1), with an alpha a sample and g the gradient of x:

    x_n = r_n + a_n (f_n - r_n), computed as f_n - (1 - a_n) (f_n - r_n) where a_n >= 1/2: exact at both ends
    dr_n = (1 - a_n) g_n         df_n = a_n g_n

A program has a block of one sample, whose elements lie together. Forward reads both samples and writes x; backward
reads g once and writes both gradients. Bound by memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gankern.triton.aot import AotEntry
from gankern.triton.gradient_penalty import laid_out_as, sample_major

BLOCK = 2048
WARPS = 4


@triton.jit
def _points_kernel(real, fake, alpha, out, size, blocks, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(alpha + sample)
    r = tl.load(real + sample * size + i, mask=i < size, other=0.0).to(a.dtype)
    f = tl.load(fake + sample * size + i, mask=i < size, other=0.0).to(a.dtype)
    x = tl.where(a < 0.5, r + a * (f - r), f - (1 - a) * (f - r))
    tl.store(out + sample * size + i, x.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _gradients_kernel(grad, alpha, grad_real, grad_fake, size, blocks, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(alpha + sample)
    g = tl.load(grad + sample * size + i, mask=i < size, other=0.0).to(a.dtype)
    tl.store(grad_real + sample * size + i, ((1 - a) * g).to(grad_real.dtype.element_ty), mask=i < size)
    tl.store(grad_fake + sample * size + i, (a * g).to(grad_fake.dtype.element_ty), mask=i < size)


def forward(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """The points. Launches: 1."""
    real = sample_major(real)
    fake, out = laid_out_as(fake, real), torch.empty_like(real)
    if out.numel():
        size = real[0].numel()
        blocks = triton.cdiv(size, BLOCK)
        with torch.cuda.device_of(real):
            _points_kernel[(len(real) * blocks,)](
                real, fake, alpha.contiguous(), out, size, blocks, BLOCK=BLOCK, num_warps=WARPS
            )
    return out


def backward(grad: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of real and fake. Launches: 1."""
    grad = sample_major(grad)
    grad_real, grad_fake = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        size = grad[0].numel()
        blocks = triton.cdiv(size, BLOCK)
        with torch.cuda.device_of(grad):
            _gradients_kernel[(len(grad) * blocks,)](
                grad, alpha.contiguous(), grad_real, grad_fake, size, blocks, BLOCK=BLOCK, num_warps=WARPS
            )
    return grad_real, grad_fake


# ---- what the ahead-of-time check compiles -----------------------------------------------------------------

AOT = [
    AotEntry(
        kernel,
        {**dict.fromkeys(tensors, f"*{name}"), "alpha": f"*{wide}", "size": "i64", "blocks": "i32"},
        {"BLOCK": BLOCK},
        WARPS,
    )
    for name, wide in (("fp64", "fp64"), ("fp32", "fp32"), ("bf16", "fp32"))
    for kernel, tensors in (
        (_points_kernel, ("real", "fake", "out")),
        (_gradients_kernel, ("grad", "grad_real", "grad_fake")),
    )
]
