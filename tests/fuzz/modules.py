"""Modules of gankern.nn with options that are drawn, against themselves in plain double precision: results, gradients of
first and second order, buffers and the state_dict, in training and in evaluation; and options that are wrong."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from drawing import Draw, Problem, difference, size
from torch import Tensor, nn

import gankern
import gankern.nn as gnn

PAD = ("zeros", "reflect", "replicate", "circular")
PIECES = (None, "relu", "leaky_relu")


def _norm(draw: Draw, dimensions: int) -> tuple[Any, dict[str, Any], tuple[int, ...]]:
    c = draw.choice((1, 3, 8))
    kinds = {1: (gnn.BatchNormAct1d, gnn.InstanceNormAct1d), 2: (gnn.BatchNormAct2d, gnn.InstanceNormAct2d)}
    make = draw.choice(kinds.get(dimensions, (gnn.BatchNormAct3d, gnn.InstanceNormAct3d)))
    options = {
        "num_features": c, "eps": draw.choice((1e-5, 1e-3, 0.1)), "momentum": draw.choice((0.1, 0.5, 1.0)),
        "affine": draw.random() < 0.7, "track_running_stats": draw.random() < 0.7,
        "activation": draw.choice(PIECES), "negative_slope": draw.choice((0.0, 0.01, 0.2)),
    }  # fmt: skip
    return make, options, (draw.choice((2, 4)), c, *(draw.choice((2, 3)) for _ in range(dimensions)))


def _convolution(draw: Draw) -> tuple[Any, dict[str, Any], tuple[int, ...]]:
    a, b = draw.choice((1, 3, 8)), draw.choice((1, 4, 8))
    make = draw.choice(
        (gnn.Conv2d, gnn.ConvTranspose2d, gnn.EqualizedConv2d, gnn.UpsampleConv2d, gnn.ConvDownsample2d, gnn.SubpixelConv2d)
    )  # fmt: skip
    options: dict[str, Any] = {"in_channels": a, "out_channels": b, "bias": draw.random() < 0.7}
    side = draw.randint(4, 7)
    if make is gnn.Conv2d:
        k, s, p = draw.choice(((3, 1, 1), (3, 1, 0), (3, 1, 2), (4, 2, 1), (1, 1, 0), (5, 2, 2)))
        options |= {"kernel_size": k, "stride": s, "padding": p, "padding_mode": draw.choice(PAD) if p else "zeros"}
    elif make is gnn.ConvTranspose2d:
        k, s, p = draw.choice(((4, 2, 1), (3, 1, 1), (3, 2, 1)))
        options |= {"kernel_size": k, "stride": s, "padding": p}
    elif make is gnn.EqualizedConv2d:
        options |= {"kernel_size": 3, "padding": 1, "resample": draw.choice((None, "upsample", "downsample"))}
        options["gain"] = draw.choice((1.0, math.sqrt(2), 0.5))
    elif make is gnn.SubpixelConv2d:
        options |= {"kernel_size": 3, "upscale_factor": draw.choice((2, 3))}
    else:
        options["kernel_size"] = draw.choice((1, 3, 5))
    return make, options, (draw.choice((1, 2, 3)), a, side, draw.randint(4, 7))


def _pointwise(draw: Draw) -> tuple[Any, dict[str, Any], tuple[int, ...]]:
    c = draw.choice((1, 4, 7))
    make = draw.choice((gnn.BiasAct, gnn.BiasActPixelNorm, gnn.PixelNorm, gnn.LeakyReLU, gnn.ReLU))
    options: dict[str, Any] = {}
    if make is gnn.BiasAct:
        names = ("linear", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "selu", "softplus", "silu")
        options = {"num_channels": c, "activation": draw.choice(names), "clamp": draw.maybe(0.7, 0.3)}
        options |= {"gain": draw.choice((1.0, 1.4)), "negative_slope": draw.choice((0.2, 0.0))}
    elif make is gnn.BiasActPixelNorm:
        options = {"num_channels": c, "activation": draw.choice(PIECES[1:]), "gain": draw.choice((1.0, 1.4))}
    elif make is gnn.PixelNorm:
        options = {"eps": draw.choice((1e-8, 1e-4))}
    elif make is gnn.LeakyReLU:
        options = {"negative_slope": draw.choice((0.01, 0.2, 0.0))}
    return make, options, (draw.choice((1, 3)), c, *(draw.randint(1, 5) for _ in range(draw.randint(0, 2))))


def _other(draw: Draw) -> tuple[Any, dict[str, Any], tuple[int, ...]]:
    n, c = draw.choice((2, 4, 6)), draw.choice((2, 4))
    if draw.random() < 0.5:
        options = {
            "group_size": draw.choice((2, n)), "num_channels": draw.choice((1, 2)),
            "layout": draw.choice(("strided", "contiguous")), "unbiased": draw.random() < 0.5,
        }  # fmt: skip
        return gnn.MinibatchStdDev, options, (n, c, 3, 4)
    options = {
        "in_features": c, "num_kernels": 3, "kernel_dim": 2, "include_self": draw.random() < 0.5,
        "reduction": draw.choice(("sum", "mean")),
    }  # fmt: skip
    return gnn.MinibatchDiscrimination, options, (n, c)


def _drawn(draw: Draw) -> tuple[Any, dict[str, Any], tuple[int, ...]]:
    which = draw.randrange(5)
    if which == 0:
        return _norm(draw, draw.randint(1, 3))
    if which < 3:
        return _convolution(draw)
    return _pointwise(draw) if which == 3 else _other(draw)


def _normalized(draw: Draw, module: nn.Module) -> nn.Module:
    """Some layers with a weight have it spectrally normalised."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim > 1 and draw.random() < 0.3:
        apply = draw.choice((gnn.utils.spectral_norm, gnn.utils.parametrizations.spectral_norm))
        return apply(module, n_power_iterations=draw.choice((1, 3)))
    return module


def _seen(module: nn.Module, x: Tensor, g: Tensor, plainly: bool) -> list[Tensor]:
    """The result, the gradients, those of a penalty on x's, and the buffers."""
    with gankern.use_implementation("reference") if plainly else torch.enable_grad():
        x = x.detach().requires_grad_()
        y = module(x)
        first = torch.autograd.grad(
            (y * g.expand_as(y)).sum(), [x, *module.parameters()], create_graph=True, allow_unused=True
        )
        penalty = first[0].square().sum() if first[0] is not None and first[0].requires_grad else None
        second: tuple[Tensor | None, ...] = (None,) * len(first)
        if penalty is not None:
            second = torch.autograd.grad(penalty, [x, *module.parameters()], allow_unused=True)
    found = [y, *first, *second]
    return [torch.zeros(()) if t is None else t.detach() for t in found] + [b.clone() for b in module.buffers()]


def _wrong(draw: Draw, make: Any, options: dict[str, Any]) -> Problem:
    """An option that is wrong: an error when the module is built that names it, and never at the first forward."""
    name = draw.choice(sorted(options))
    accepted = {
        "bias", "affine", "track_running_stats", "unbiased", "include_self", "padding", "stride",
        "in_channels", "out_channels", "kernel_size", "num_features", "in_features",
    }  # fmt: skip  # flags, and what torch itself checks or takes as it comes
    if name in accepted or (name == "padding_mode" and make is gnn.Conv2d):
        return None
    value = draw.choice(("not one", [], object()))
    try:
        made = make(**options | {name: value})
    except (ValueError, TypeError) as error:
        return (
            None if name in str(error) else f"{make.__name__}({name}={value!r}): the message does not name it: {error}"
        )
    except Exception as error:
        return f"{make.__name__}({name}={value!r}): {type(error).__name__}: {error}"
    return f"{made}: {name}={value!r} is accepted"


def case(seed: int) -> Problem:
    draw = Draw(seed)
    make, options, shape = _drawn(draw)
    assert set(options) <= set(inspect.signature(make).parameters), (make, options)
    if draw.random() < 0.1:
        return _wrong(draw, make, options) if options else None
    torch.manual_seed(draw.randrange(2**31))
    dtype = draw.choices((torch.float64, torch.float32), (3, 1))[0]
    module = _normalized(draw, make(**options)).to(dtype)
    for p in module.parameters():
        p.data += draw.values(p.shape, 0.2).to(dtype)
    module.train(draw.random() < 0.7)
    right_module, plain_module = copy.deepcopy(module).double(), copy.deepcopy(module)
    values = draw.values(shape).to(dtype)
    x, form = draw.strided(values)
    text = f"{module}, {'training' if module.training else 'evaluation'}, {dtype}, {shape} ({form})".replace("\n", " ")
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for _ in range(2):
        g = draw.values((1,)).to(dtype)
        try:
            right = _seen(right_module, x.double().clone(), g.double(), plainly=True)
        except (RuntimeError, ValueError) as error:
            try:
                _seen(module, x, g, plainly=False)
            except (RuntimeError, ValueError):
                return None
            return f"{text}: a value where plain PyTorch has the error {error}"
        ours = _seen(module, x, g, plainly=False)
        plain = right if dtype == torch.float64 else _seen(plain_module, values, g, plainly=True)
        scale = 1 + size(right)
        for i, (a, b, p) in enumerate(zip(ours, right, plain, strict=True)):
            if not difference(a, b) <= tolerance * scale + 2 * difference(p, b):
                return f"{text}: number {i} is off by {difference(a, b):.2e} of {scale:.2e}"
    if list(module.state_dict()) != list(right_module.state_dict()):
        return f"{text}: other keys"
    return None
