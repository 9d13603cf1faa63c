"""Replaces a generator's transposed convolutions by layers that make no checkerboard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import gankern.functional as GF
import gankern.nn as gnn

EXACT = 1e-5  # the largest relative difference of a kernel that is called none


@dataclass(frozen=True)
class Replacement:
    """What became of one transposed convolution."""

    layer: str
    before: str
    after: str | None  # None where it was left as it is
    error: float | None  # of the kernel, relative: 0 where the new layer computes the same
    note: str

    @property
    def exact(self) -> bool:
        return self.error is not None and self.error <= EXACT


def replace_upsampling(generator: nn.Module, with_: str = "resize_conv") -> list[Replacement]:
    """Replaces the transposed convolutions of a generator that upsample, in place, and reports on each.

    Any transposed convolution whose result is stride times its input is a sub-pixel convolution: "subpixel" computes
    the same, with weights that can be trained out of a checkerboard only by training. A resize-convolution and a FIR
    filter with a convolution of 3 x 3 are fewer functions: trained weights are mapped to the nearest kernel (least
    squares), and the report says how far that is; a relative error near 1 means that the layer has to be trained again.

    Args:
        generator: a module that contains transposed convolutions; changed in place.
        with_: "resize_conv" (gankern.nn.UpsampleConv2d, for stride 2), "subpixel" (gankern.nn.SubpixelConv2d) or "fir"
            (gankern.nn.FIRUpsample2d and torch.nn.Conv2d).

    Returns:
        A :class:`Replacement` for each transposed convolution of a stride above 1, also of those left as they are.

    Raises:
        ValueError: where with_ is unknown or the generator is itself a transposed convolution, or has none.

    >>> net = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1))
    >>> replace_upsampling(net, "subpixel")[0].exact, net[0].kernel_size
    (True, (3, 3))
    """
    makers = {"resize_conv": _resize, "subpixel": _subpixel, "fir": _fir}
    if with_ not in makers:
        raise ValueError(f"replace_upsampling: with_ is {with_!r}; accepted are {', '.join(makers)}")
    if isinstance(generator, nn.ConvTranspose2d):
        raise ValueError("replace_upsampling: the generator is itself a transposed convolution; put it into a module")
    report = []
    for name, parent in list(generator.named_modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.ConvTranspose2d) and max(child.stride) > 1:
                full = f"{name}.{child_name}" if name else child_name
                report.append(_replace(parent, child_name, child, full, makers[with_]))
    if not report:
        raise ValueError(
            f"replace_upsampling: {type(generator).__name__} has no transposed convolution of a stride above 1 "
            f"(torch.nn.ConvTranspose2d)"
        )
    return report


def _replace(parent: nn.Module, child_name: str, layer: nn.ConvTranspose2d, name: str, make: Callable) -> Replacement:
    before = f"ConvTranspose2d {layer.kernel_size[0]}x{layer.kernel_size[1]}, stride {layer.stride[0]}"
    refusal = _refusal(layer)
    if refusal is None:
        try:
            new, error = make(layer)
        except ValueError as reason:
            refusal = str(reason)
    if refusal is not None:
        return Replacement(name, before, None, None, refusal)
    new.train(layer.training)
    for parameter in new.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    setattr(parent, child_name, new)
    note = "the same function" if error <= EXACT else "another function: the nearest kernel; train it again"
    after = type(new).__name__ if not isinstance(new, nn.Sequential) else " + ".join(type(m).__name__ for m in new)
    return Replacement(name, before, after, error, note)


def _refusal(layer: nn.ConvTranspose2d) -> str | None:
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return "its weight is computed from others (a spectral norm, for instance): remove that first"
    if layer.groups != 1 or layer.dilation != (1, 1):
        return "it has groups or a dilation"
    if layer.stride[0] != layer.stride[1]:
        return "its strides differ"
    s = layer.stride[0]
    for k, p, extra in zip(layer.kernel_size, _padding(layer), layer.output_padding):
        if k - 2 * p + extra != s:
            return f"its result is not exactly {s} times its input (kernel - 2 padding + output_padding is not {s})"
    return None


# ---- the new layers -----------------------------------------------------------------------------------------


def _padding(layer: nn.ConvTranspose2d) -> tuple[int, ...]:
    assert isinstance(layer.padding, tuple)  # numbers always, where a convolution is transposed
    return layer.padding


def _like(layer: nn.ConvTranspose2d) -> dict:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


@torch.no_grad()
def _subpixel(layer: nn.ConvTranspose2d) -> tuple[nn.Module, float]:
    """Output s q + r reads x[q + d] with the tap r + padding - s d: for each phase r a convolution of its own."""
    s, padding = layer.stride[0], _padding(layer)
    reach = []
    for k, p in zip(layer.kernel_size, padding):
        # d from ceil((r + p - k + 1) / s) to floor((r + p) / s), over all r.
        reach.append(max(0, (k - 1 - p) // s, (s - 1 + p) // s))
    size = 2 * reach[0] + 1, 2 * reach[1] + 1
    new = gnn.SubpixelConv2d(
        layer.in_channels,
        layer.out_channels,
        size,
        s,
        padding=(reach[0], reach[1]),
        bias=layer.bias is not None,
        icnr=False,
        **_like(layer),
    )
    weight = new.weight.zero_().view(layer.out_channels, s, s, layer.in_channels, *size)
    for ry in range(s):
        for rx in range(s):
            for dy in range(-reach[0], reach[0] + 1):
                for dx in range(-reach[1], reach[1] + 1):
                    jy, jx = ry + padding[0] - s * dy, rx + padding[1] - s * dx
                    if 0 <= jy < layer.kernel_size[0] and 0 <= jx < layer.kernel_size[1]:
                        weight[:, ry, rx, :, dy + reach[0], dx + reach[1]] = layer.weight[:, :, jy, jx].t()
    if layer.bias is not None and new.bias is not None:
        new.bias.copy_(layer.bias.repeat_interleave(s * s))
    return new, 0.0


def _resize(layer: nn.ConvTranspose2d) -> tuple[nn.Module, float]:
    if layer.stride[0] != 2:
        raise ValueError("resize-convolutions are for stride 2")
    new = gnn.UpsampleConv2d(layer.in_channels, layer.out_channels, 3, bias=layer.bias is not None, **_like(layer))
    error = _fit(layer, new, lambda x: F.interpolate(x, scale_factor=(1, 2)))
    return new, error


def _fir(layer: nn.ConvTranspose2d) -> tuple[nn.Module, float]:
    s = layer.stride[0]
    up = gnn.FIRUpsample2d(s, "1331" if s == 2 else "kaiser").to(**_like(layer))
    convolution = nn.Conv2d(
        layer.in_channels, layer.out_channels, 3, padding=1, bias=layer.bias is not None, **_like(layer)
    )
    across = up.filter.detach().double().cpu()[None, :]  # the horizontal half of a separable filter
    error = _fit(layer, convolution, lambda x: GF.upsample2d(x, across, up=(1, s)))
    return nn.Sequential(up, convolution), error


@torch.no_grad()
def _fit(layer: nn.ConvTranspose2d, convolution: nn.Conv2d, upsample: Callable[[Tensor], Tensor]) -> float:
    """Gives the convolution after the (separable) upsampling the kernel whose response to an impulse is nearest to the
    layer's, and returns the relative difference that is left."""
    s = layer.stride[0]
    radius = 4 * max(s, *layer.kernel_size)
    impulse = torch.zeros(1, 1, 1, 2 * radius + 1, dtype=torch.float64)
    impulse[..., radius] = 1
    up = upsample(impulse)[0, 0, 0]
    # Column t: the response, on one axis, to the kernel with a 1 at t alone; a convolution of 3 reads o + t - 1.
    basis = torch.stack([torch.roll(up, 1 - t) for t in range(3)], 1)
    target = layer.weight.detach().double().cpu()  # [in, out, k, k]
    wide = target.new_zeros(*target.shape[:2], len(up), len(up))
    first = [radius * s - p for p in _padding(layer)]
    k = layer.kernel_size
    wide[:, :, first[0] : first[0] + k[0], first[1] : first[1] + k[1]] = target
    inverse = torch.linalg.pinv(basis)
    kernel = inverse @ wide @ inverse.t()
    error = (basis @ kernel @ basis.t() - wide).norm() / wide.norm().clamp_min(1e-300)
    convolution.weight.copy_(kernel.transpose(0, 1))
    if layer.bias is not None and convolution.bias is not None:
        convolution.bias.copy_(layer.bias)
    return error.item()
