"""Every function of gankern.functional against a formula in plain PyTorch that was written apart from the library.

Dtype, strides and the need of a gradient are drawn for each argument apart, options for each call; results, gradients
and gradients of gradients are held against the formula in double precision.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from drawing import Draw, Problem, difference, size
from torch import Tensor

import gankern.functional as GF

Tensors = dict[str, Tensor | None]


@dataclass
class Call:
    tensors: Tensors  # in double precision
    ours: Callable[..., Any]  # (implementation=, **tensors)
    right: Callable[..., Any]  # (**tensors)
    constants: tuple[str, ...] = ()  # those that have no gradient
    free: tuple[str, ...] = ()  # those whose dtype is drawn apart
    wide: tuple[str, ...] = ()  # those that are float32 beside half precision
    written: tuple[str, ...] = ()  # buffers that are updated, and compared as results
    # Whether a rounding cannot move its gradients far: they are continuous, and not computed from a rounded result.
    rounds: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def _images(draw: Draw, least: int = 1, square: int = 9) -> tuple[int, int, int, int]:
    return draw.choice((0, 1, 2, 3, 5)), draw.randint(1, 9), draw.randint(least, square), draw.randint(least, square)


def _map(draw: Draw, batch: tuple[int, ...] = (0, 1, 2, 3, 5)) -> tuple[int, ...]:
    return (draw.choice(batch), draw.randint(1, 19), *(draw.randint(1, 7) for _ in range(draw.randrange(4))))


def _along(v: Tensor, ndim: int, dim: int = 1) -> Tensor:
    shape = [1] * ndim
    shape[dim] = -1
    return v.reshape(shape)


def _activate(x: Tensor, name: str | None, slope: float) -> Tensor:
    if name in (None, "linear"):
        return x
    if name == "relu":
        return torch.where(x > 0, x, 0 * x)
    if name == "leaky_relu":
        return torch.where(x > 0, x, slope * x)
    if name == "elu":
        return torch.where(x > 0, x, x.clamp(max=0).expm1())
    if name == "selu":
        return 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * x.clamp(max=0).expm1())
    if name == "softplus":
        return x.clamp(min=0) + (-x.abs()).exp().log1p()
    if name == "silu":
        return x * torch.sigmoid(x)
    return {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[name](x)


def bias_act(draw: Draw) -> Call:
    shape = _map(draw)
    dim = draw.randrange(len(shape))
    activation = draw.choice((*GF.ACTIVATIONS, "linear"))
    slope, gain = draw.choice((0.2, 0.01, 0.0, 1.0, 1.5, -0.5)), draw.choice((1.0, math.sqrt(2), -0.7, 0.0))
    clamp = draw.choice((None, None, 0.5, 2.0))
    options = dict(dim=dim, activation=activation, negative_slope=slope, gain=gain, clamp=clamp)

    def right(x, bias):
        y = x if bias is None else x + _along(bias, x.ndim, dim)
        y = gain * _activate(y, activation, slope)
        return y if clamp is None else torch.where(y.abs() < clamp, y, (y.sign() * clamp).detach())

    tensors = {"x": draw.values(shape), "bias": draw.maybe(draw.values((shape[dim],)), 0.7)}
    return Call(tensors, lambda implementation, **t: GF.bias_act(**t, **options, implementation=implementation), right,
                rounds=clamp is None and activation in ("linear", "relu", "leaky_relu", "silu"), options=options)  # fmt: skip


def pixel_norm(draw: Draw) -> Call:
    shape = list(_map(draw))
    dim = draw.randrange(len(shape))
    shape[dim] = draw.randint(3, 19)  # of one value all is cancellation
    eps = draw.choice((1e-4, 0.1))

    def norm(x):
        return x / (x.square().sum(dim, keepdim=True) / x.shape[dim] + eps).sqrt()

    if draw.random() < 0.5:
        options = dict(dim=dim, eps=eps)
        return Call({"x": draw.values(shape)}, lambda implementation, x: GF.pixel_norm(x, **options, implementation=implementation),
                    norm, options=options)  # fmt: skip
    activation = draw.choice(("linear", "relu", "leaky_relu"))
    options = dict(dim=dim, eps=eps, activation=activation, negative_slope=draw.choice((0.2, 0.0, 1.0)),
                   gain=draw.choice((1.0, math.sqrt(2))))  # fmt: skip

    def right(x, bias):
        x = x if bias is None else x + _along(bias, x.ndim, dim)
        return norm(options["gain"] * _activate(x, activation, options["negative_slope"]))

    tensors = {"x": draw.values(shape), "bias": draw.maybe(draw.values((shape[dim],)), 0.7)}
    return Call(tensors, lambda implementation, **t: GF.bias_act_pixel_norm(**t, **options, implementation=implementation),
                right, options=options)  # fmt: skip


def relus(draw: Draw) -> Call:
    shape = _map(draw)
    if draw.random() < 0.5:
        return Call({"input": draw.values(shape)}, lambda implementation, input: GF.relu(input, implementation=implementation),
                    lambda input: _activate(input, "relu", 0))  # fmt: skip
    slope = draw.choice((0.01, 0.2, 0.0, 1.0, 2.0, -0.5))
    return Call({"input": draw.values(shape)},
                lambda implementation, input: GF.leaky_relu(input, slope, implementation=implementation),
                lambda input: _activate(input, "leaky_relu", slope), options={"negative_slope": slope})  # fmt: skip


def minibatch_stddev(draw: Draw) -> Call:
    group, features = draw.randint(1, 4), draw.randint(1, 3)
    batch = group * draw.randint(1, 3)
    shape = (batch, features * draw.randint(1, 5), *(draw.randint(1, 6) for _ in range(draw.randrange(3))))
    strided, unbiased, eps = draw.random() < 0.5, draw.random() < 0.5 and group > 1, draw.choice((1e-8, 1e-3))
    options = dict(group_size=group, num_channels=features, layout="strided" if strided else "contiguous",
                   unbiased=unbiased, eps=eps)  # fmt: skip

    def right(x):
        groups = [list(range(batch))[i :: batch // group] for i in range(batch // group)]
        if not strided:
            groups = [list(range(i, i + group)) for i in range(0, batch, group)]
        new: list[Any] = [None] * batch
        for members in groups:
            deviation = (x[members].var(0, correction=int(unbiased)) + eps).sqrt()
            per_feature = torch.stack([part.mean() for part in deviation.chunk(features, 0)])
            for i in members:
                new[i] = _along(per_feature, x.ndim - 1, 0).expand(-1, *x.shape[2:])
        return torch.cat([x, torch.stack(new)], 1)

    return Call({"x": draw.values(shape)}, lambda implementation, x: GF.minibatch_stddev(x, **options, implementation=implementation),
                right, options=options)  # fmt: skip


def _similarity(m: Tensor, other: Tensor, self_too: bool) -> Tensor:
    rows = []
    for i in range(m.shape[0]):
        keep = [j for j in range(other.shape[0]) if self_too or j != i]
        rows.append((-(m[i] - other[keep]).abs().sum(2)).exp().sum(0))
    return torch.stack(rows) if rows else m.sum(2)


def l1_similarity(draw: Draw) -> Call:
    kernels, width = draw.randint(1, 9), draw.randint(1, 6)
    m = draw.values((draw.choice((0, 1, 2, 5, 9)), kernels, width), 0.5)
    if draw.random() < 0.5:
        other = draw.values((draw.choice((1, 2, 6)), kernels, width), 0.5)
        return Call({"m": m, "other": other}, lambda implementation, m, other: GF.l1_similarity(m, other, implementation=implementation),
                    lambda m, other: _similarity(m, other, True))  # fmt: skip
    included = draw.random() < 0.5
    return Call({"m": m}, lambda implementation, m: GF.l1_similarity(m, include_self=included, implementation=implementation),
                lambda m: _similarity(m, m, included), options={"include_self": included})  # fmt: skip


def minibatch_discrimination(draw: Draw) -> Call:
    batch, features, kernels, width = (
        draw.choice((1, 2, 5, 8)),
        draw.randint(1, 8),
        draw.randint(1, 6),
        draw.randint(1, 5),
    )
    included, mean = draw.random() < 0.5, draw.random() < 0.5
    options = dict(include_self=included, reduction="mean" if mean else "sum")

    def right(x, kernel):
        m = torch.einsum("ia,abc->ibc", x, kernel)
        terms = batch if included else batch - 1
        return _similarity(m, m, included) / (max(terms, 1) if mean else 1)

    tensors = {"x": draw.values((batch, features)), "kernel": draw.values((features, kernels, width), 0.2)}
    return Call(tensors, lambda implementation, **t: GF.minibatch_discrimination(**t, **options, implementation=implementation),
                right, rounds=False, options=options)  # fmt: skip


def self_attention2d(draw: Draw) -> Call:
    n, c, h, w = draw.choice((0, 1, 2, 3)), draw.randint(1, 9), draw.randint(2, 13), draw.randint(2, 13)
    keys, values = draw.randint(1, 5), draw.randint(1, 18)
    sizes = {"x": (n, c, h, w), "theta": (keys, c), "phi": (keys, c), "g": (values, c), "out": (c, values), "gamma": ()}

    def right(x, theta, phi, g, out, gamma):
        q = torch.einsum("dc,nchw->ndhw", theta, x).flatten(2)
        k, v = (F.max_pool2d(torch.einsum("dc,nchw->ndhw", t, x), 2).flatten(2) for t in (phi, g))
        weights = torch.einsum("ndi,ndj->nij", q, k).softmax(2)
        found = torch.einsum("nij,nej->nei", weights, v)
        return x + gamma * torch.einsum("ce,nei->nci", out, found).reshape(x.shape)

    return Call({name: draw.values(size, 0.5) for name, size in sizes.items()},
                lambda implementation, **t: GF.self_attention2d(**t, implementation=implementation),
                right, rounds=False)  # fmt: skip


def gradient_penalty(draw: Draw) -> Call:
    shape = _map(draw)[: draw.choice((1, 2, 4))]
    target, one_sided = draw.choice((1.0, 0.0, 2.5)), draw.random() < 0.4
    options = dict(target=target, one_sided=one_sided)

    def right(gradient):
        norms = gradient.reshape(shape[0], -1 if gradient.numel() else 1).square().sum(1)
        if target == 0:
            return norms
        excess = norms.sqrt() - target
        return (excess.clamp(min=0) if one_sided else excess).square()

    return Call({"gradient": draw.values(shape) + 0.1},
                lambda implementation, gradient: GF.gradient_penalty(gradient, **options, implementation=implementation),
                right, rounds=not one_sided, options=options)  # fmt: skip


def _normalised(draw: Draw, function: Any, shape: Any, affine: Any, kept: bool, right: Any, options: dict) -> Call:
    """A call of batch or instance norm, with running statistics where they are ``kept``."""
    tensors: Tensors = {
        "x": draw.values(shape) + 0.5,
        "running_mean": draw.values((shape[1],)) if kept else None,
        "running_var": draw.positive((shape[1],)) if kept else None,
        "weight": draw.maybe(draw.values(affine), 0.7),
        "bias": draw.maybe(draw.values(affine), 0.7),
    }
    statistics = ("running_mean", "running_var")
    return Call(tensors, lambda implementation, **t: function(**t, **options, implementation=implementation), right,
                constants=statistics, wide=statistics, written=statistics, rounds=options["activation"] is None,
                options=options)  # fmt: skip


def batch_norm_act(draw: Draw) -> Call:
    training = draw.random() < 0.5
    shape = (draw.choice((2, 3, 5)), draw.randint(1, 12), *(draw.randint(1, 6) for _ in range(draw.randrange(4))))
    own = draw.random() < 0.3  # a gain and a bias for each sample
    affine = (shape[0], shape[1]) if own else (shape[1],)
    activation, slope, eps = (
        draw.choice((None, None, "relu", "leaky_relu")),
        draw.choice((0.01, 0.2)),
        draw.choice((1e-5, 0.1)),
    )
    momentum = draw.choice((0.1, 0.0, 1.0, 0.37))
    options = dict(training=training, momentum=momentum, eps=eps, activation=activation, negative_slope=slope)
    kept = not training or draw.random() < 0.7

    def right(x, running_mean, running_var, weight, bias):
        over = [d for d in range(x.ndim) if d != 1]
        if training:
            mean = x.mean(over)
            var = (x - _along(mean, x.ndim)).square().mean(over)
            if running_mean is not None:
                count = x.numel() // x.shape[1]
                with torch.no_grad():
                    running_mean.mul_(1 - momentum).add_(momentum * mean)
                    running_var.mul_(1 - momentum).add_(momentum * var * count / max(count - 1, 1))
        else:
            mean, var = running_mean, running_var
        y = (x - _along(mean, x.ndim)) / (_along(var, x.ndim) + eps).sqrt()

        def spread(v):
            return v.reshape(*v.shape, *[1] * (x.ndim - 2)) if own else _along(v, x.ndim)

        y = y if weight is None else y * spread(weight)
        y = y if bias is None else y + spread(bias)
        return _activate(y, activation, slope)

    if training and math.prod(shape) == shape[0] * shape[1] and shape[0] == 2 and not kept:
        eps = options["eps"] = 0.1  # two values: their difference alone decides, and its sign is a step
    return _normalised(draw, GF.batch_norm_act, shape, affine, kept, right, options)


def instance_norm_act(draw: Draw) -> Call:
    shape = (
        draw.choice((1, 2, 5)),
        draw.randint(1, 12),
        draw.randint(3, 9),
        *(draw.randint(1, 6) for _ in range(draw.randrange(3))),
    )
    own = draw.random() < 0.3  # a gain and a bias for each sample
    affine = (shape[0], shape[1]) if own else (shape[1],)
    activation, slope = draw.choice((None, None, "relu", "leaky_relu")), draw.choice((0.01, 0.2))
    eps, momentum = draw.choice((1e-5, 0.1)), draw.choice((0.1, 0.0, 1.0, 0.37))
    options = dict(momentum=momentum, eps=eps, activation=activation, negative_slope=slope)
    kept = draw.random() < 0.3

    def right(x, running_mean, running_var, weight, bias):
        over, count = list(range(2, x.ndim)), x[0, 0].numel()
        mean = x.mean(over, keepdim=True)
        var = (x - mean).square().mean(over, keepdim=True)
        if running_mean is not None:
            with torch.no_grad():
                running_mean.mul_(1 - momentum).add_(momentum * mean.mean(0).flatten())
                running_var.mul_(1 - momentum).add_(momentum * var.mean(0).flatten() * count / (count - 1))
        y = (x - mean) / (var + eps).sqrt()

        def spread(v):
            return v.reshape(*v.shape, *[1] * (x.ndim - 2))

        y = y if weight is None else y * spread(weight)
        y = y if bias is None else y + spread(bias)
        return _activate(y, activation, slope)

    return _normalised(draw, GF.instance_norm_act, shape, affine, kept, right, options)


def group_norm_act(draw: Draw) -> Call:
    groups, members = draw.randint(1, 4), draw.randint(1, 5)
    positions = [draw.randint(1, 6) for _ in range(draw.randrange(4))]
    if members == 1 and math.prod(positions) == 1:
        members = 2
    shape = (draw.choice((1, 2, 5)), groups * members, *positions)
    affine = shape[:2] if draw.random() < 0.3 else shape[1:2]
    activation, slope = draw.choice((None, "relu", "leaky_relu")), draw.choice((0.01, 0.2))
    eps = draw.choice((1e-5, 0.1)) if members * math.prod(positions) > 2 else 0.1  # of two values it decides
    options = dict(eps=eps, activation=activation, negative_slope=slope)

    def right(x, running_mean, running_var, weight, bias):
        of_groups = x.reshape(shape[0], groups, -1)
        centred = of_groups - of_groups.mean(2, keepdim=True)
        y = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
        weight, bias = (None if v is None else v.reshape(*v.shape, *[1] * (x.ndim - 2)) for v in (weight, bias))
        y = y if weight is None else y * weight
        return _activate(y if bias is None else y + bias, activation, slope)

    def ours(x, running_mean, running_var, weight, bias, **options):
        return GF.group_norm_act(x, groups, weight, bias, **options)

    return _normalised(draw, ours, shape, affine, False, right, options)


def virtual_batch_norm(draw: Draw) -> Call:
    shape = _map(draw)
    count = draw.choice((None, 1, 7, 64))
    activation, slope, eps = (
        draw.choice((None, None, "relu", "leaky_relu")),
        draw.choice((0.2, 0.01)),
        draw.choice((1e-5, 0.1)),
    )

    def right(x, ref_mean, ref_mean_square, weight, bias):
        c = 0.0 if count is None else 1 / (count + 1)
        pixels = tuple(range(2, x.ndim))
        a = x.mean(pixels, keepdim=True) if pixels else x
        q = x.square().mean(pixels, keepdim=True) if pixels else x.square()
        mu = c * a + (1 - c) * _along(ref_mean, x.ndim)
        s = c * q + (1 - c) * _along(ref_mean_square, x.ndim)
        y = (x - mu) / (s - mu.square() + eps).sqrt()
        y = y if weight is None else y * _along(weight, x.ndim)
        y = y if bias is None else y + _along(bias, x.ndim)
        return _activate(y, activation, slope)

    mean = draw.values((shape[1],), 0.3)
    tensors = {
        "x": draw.values(shape),
        "ref_mean": mean,
        "ref_mean_square": mean.square().amax() + draw.positive((shape[1],)),
        "weight": draw.maybe(draw.values((shape[1],)), 0.7),
        "bias": draw.maybe(draw.values((shape[1],)), 0.7),
    }
    options = dict(ref_count=count, eps=eps, activation=activation, negative_slope=slope)
    return Call(tensors, lambda implementation, **t: GF.virtual_batch_norm(**t, **options, implementation=implementation), right,
                free=("ref_mean", "ref_mean_square", "weight", "bias"), rounds=activation is None, options=options)  # fmt: skip


def virtual_batch_norm_statistics(draw: Draw) -> Call:
    shape = _map(draw, (1, 2, 5))

    def right(x):
        over = [d for d in range(x.ndim) if d != 1]
        return x.double().mean(over), x.double().square().mean(over)

    return Call({"x": draw.values(shape)},
                lambda implementation, x: GF.virtual_batch_norm_statistics(x, implementation=implementation), right)  # fmt: skip


def _upfirdn(x, filter, up, down, edges, flip, gain):
    """As the four steps say, on each plane."""
    taps = filter if filter.ndim == 2 else torch.outer(filter, filter)
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h * up[0], w * up[1])
    z = z.index_put((torch.arange(n)[:, None, None, None], torch.arange(c)[:, None, None],
                     torch.arange(h)[:, None] * up[0], torch.arange(w) * up[1]), x)  # fmt: skip
    left, right, top, bottom = edges
    z = F.pad(z, [max(e, 0) for e in edges])
    z = z[:, :, max(-top, 0) : z.shape[2] - max(-bottom, 0), max(-left, 0) : z.shape[3] - max(-right, 0)]
    rows, columns = z.shape[2] - taps.shape[0] + 1, z.shape[3] - taps.shape[1] + 1
    y = 0
    for i in range(taps.shape[0]):
        for j in range(taps.shape[1]):
            tap = taps[i, j] if flip else taps[-1 - i, -1 - j]
            y = y + tap * z[:, :, i : i + rows, j : j + columns]
    return gain * y[:, :, :: down[0], :: down[1]]


def upfirdn2d(draw: Draw) -> Call:
    kind = draw.choice(("upfirdn2d", "upsample2d", "downsample2d", "filter2d"))
    taps = (draw.randint(1, 6),) if draw.random() < 0.6 else (draw.randint(1, 5), draw.randint(1, 5))
    k = taps * 2 if len(taps) == 1 else taps
    up = (draw.randint(1, 3), draw.randint(1, 3)) if kind in ("upfirdn2d", "upsample2d") else (1, 1)
    down = (draw.randint(1, 3), draw.randint(1, 3)) if kind in ("upfirdn2d", "downsample2d") else (1, 1)
    shape = _images(draw, 4)
    padding = tuple(draw.randint(-1 if kind == "upfirdn2d" else 0, 3) for _ in range(4))
    flip, gain = draw.random() < 0.5, draw.choice((1, 2.0, -0.5))
    extra = {
        "upfirdn2d": lambda k, u, d: (k, k),  # enough for any filter
        "upsample2d": lambda k, u, d: ((k + u - 1) // 2, (k - u) // 2),
        "downsample2d": lambda k, u, d: ((k - d + 1) // 2, (k - d) // 2),
        "filter2d": lambda k, u, d: (k // 2, (k - 1) // 2),
    }[kind]
    vertical, horizontal = (extra(k[a], up[a], down[a]) for a in (0, 1))
    edges = tuple(p + e for p, e in zip(padding, (*horizontal, *vertical)))
    if kind == "upfirdn2d":
        padding = edges
    if any(shape[2 + a] * up[a] + sum(edges[2 - 2 * a : 4 - 2 * a]) < k[a] for a in (0, 1)):
        padding = tuple(p + 6 for p in padding)
        edges = tuple(e + 6 for e in edges)
    options: dict[str, Any] = dict(padding=padding, flip_filter=flip, gain=gain)
    if kind in ("upfirdn2d", "upsample2d"):
        options["up"] = up
    if kind in ("upfirdn2d", "downsample2d"):
        options["down"] = down
    factor = gain * up[0] * up[1] if kind == "upsample2d" else gain
    return Call({"x": draw.values(shape), "filter": draw.values(taps)},
                lambda implementation, **t: getattr(GF, kind)(**t, **options, implementation=implementation),
                lambda x, filter: _upfirdn(x, filter, up, down, edges, flip, factor),
                constants=("filter",), free=("filter",), options={"function": kind, **options})  # fmt: skip


def fir_convolutions(draw: Draw) -> Call:
    upward, factor, width = draw.random() < 0.5, draw.randint(1, 3), draw.choice((1, 3, 5))
    k = draw.randint(1, 5)
    n, c = draw.choice((1, 2)), draw.randint(1, 4)
    shape = (n, c, factor * draw.randint(3, 5), factor * draw.randint(3, 5))
    outputs = draw.randint(1, 4)

    def right(x, weight, bias, filter):
        # Convolution and filter one after the other, their results not cut off in between: padded by far.
        far = 24 * factor
        before, after = (
            ((k + factor - 1) // 2, (k - factor) // 2) if upward else ((k - factor + 1) // 2, (k - factor) // 2)
        )
        if upward:
            edges = (before + far, after + far) * 2
            y = _upfirdn(x, filter, (factor,) * 2, (1, 1), edges, False, factor**2)
            y = F.conv2d(y, weight, padding=width // 2)[:, :, far:-far, far:-far]
        else:
            y = F.conv2d(F.pad(x, [far] * 4), weight, padding=width // 2)
            y = _upfirdn(y, filter, (1, 1), (factor,) * 2, (before, after) * 2, False, 1)
            cut = far // factor
            y = y[:, :, cut:-cut, cut:-cut]
        return y if bias is None else y + _along(bias, 4)

    tensors = {"x": draw.values(shape), "weight": draw.values((outputs, c, width, width), 0.5),
               "bias": draw.maybe(draw.values((outputs,)), 0.7), "filter": draw.values((k,))}  # fmt: skip
    function = GF.fir_upsample_conv2d if upward else GF.fir_downsample_conv2d
    return Call(tensors, lambda implementation, **t: function(**t, **{"up" if upward else "down": factor}, implementation=implementation),
                right, constants=("filter",), free=("filter",), options={"function": function.__name__, "factor": factor})  # fmt: skip


def convolutions(draw: Draw) -> Call:
    kind = draw.choice(("conv2d", "conv2d", "conv_transpose2d", "conv2d_downsample", "upsample_conv2d"))
    scale = draw.choice((1.0, 1.0, 0.3))
    n, c, outputs = draw.choice((1, 2, 3)), draw.choice((1, 3, 8, 16)), draw.choice((1, 4, 8, 17))
    h, w = draw.randint(4, 12), draw.randint(4, 12)
    bias = draw.maybe(draw.values((outputs,)), 0.7)
    options: dict[str, Any] = {"weight_scale": scale}
    if kind in ("conv2d_downsample", "upsample_conv2d"):
        size_ = draw.choice((1, 3, 3, 5))
        weight = draw.values((outputs, c, size_, size_), 0.3)

        def right(x, weight, bias):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if kind == "upsample_conv2d" else x
            y = F.conv2d(x, weight * scale, bias, padding=size_ // 2)
            return y if kind == "upsample_conv2d" else F.avg_pool2d(y, 2)
    else:
        size_, stride, padding = draw.choice(
            ((3, 1, 1), (3, 1, 0), (3, 1, 2), (4, 2, 1), (1, 1, 0), (5, 2, 2), (4, 1, 0))
        )
        shape = (outputs, c, size_, size_) if kind == "conv2d" else (c, outputs, size_, size_)
        weight = draw.values(shape, 0.3)
        options |= dict(stride=stride, padding=padding)
        if kind == "conv_transpose2d" and stride == 2:
            options["output_padding"] = draw.randint(0, 1)

        def right(x, weight, bias):
            more = {k: v for k, v in options.items() if k != "weight_scale"}
            return getattr(F, kind)(x, weight * scale, bias, **more)

    def ours(implementation, x, weight, bias):
        return getattr(GF, kind)(x, weight, bias, **options, implementation=implementation)

    return Call({"x": draw.values((n, c, h, w)), "weight": weight, "bias": bias}, ours, right,
                options={"function": kind, **options})  # fmt: skip


def spectral_norm(draw: Draw) -> Call:
    count = draw.choice((1, 1, 2, 3))
    dialect, training, iterations = (
        draw.choice(tuple(GF.SPECTRAL_NORM_DIALECTS)),
        draw.random() < 0.6,
        draw.randint(1, 3),
    )
    eps = draw.choice((1e-12, 1e-4))
    tensors: Tensors = {}
    dims = []
    for i in range(count):
        shape = tuple(draw.randint(1, 7) for _ in range(draw.randint(2, 4)))
        shape = (2, *shape[1:]) if math.prod(shape) == 1 else shape  # one value's gradients are 0 after cancellation
        dims.append(draw.randrange(2))
        tensors[f"weight{i}"] = draw.values(shape)
        # Near the largest singular value: sigma must not be all cancellation.
        matrix = tensors[f"weight{i}"].movedim(dims[-1], 0).flatten(1)
        tensors[f"u{i}"] = F.normalize(matrix @ matrix.T @ draw.values((matrix.shape[0],)), dim=0)
        tensors[f"v{i}"] = F.normalize(matrix.T @ tensors[f"u{i}"] + draw.values((matrix.shape[1],), 0.05), dim=0)
    options = dict(n_power_iterations=iterations, eps=eps, training=training, dialect=dialect)

    def ours(implementation, **t):
        lists = [[t[f"{name}{i}"] for i in range(count)] for name in ("weight", "u", "v")]
        if count == 1:
            return GF.spectral_norm(*(x[0] for x in lists), dim=dims[0], **options, implementation=implementation)
        return tuple(GF.spectral_norm_group(*lists, dims=dims, **options, implementation=implementation))

    def right(**t):
        results = []
        for i in range(count):
            w, u, v = t[f"weight{i}"], t[f"u{i}"], t[f"v{i}"]
            m = w.movedim(dims[i], 0).flatten(1)

            def n(x):
                return (
                    x / (x.norm() + eps)
                    if dialect == "wrapper"
                    else x / max(x.norm(), torch.tensor(eps, dtype=x.dtype))
                )

            with torch.no_grad():
                a, b = u.to(m.dtype), v.to(m.dtype)
                if training or dialect in ("wrapper", "biggan"):
                    for _ in range(iterations):
                        if dialect == "parametrization":
                            a = n(m @ b)
                            b = n(m.T @ a)
                        else:
                            b = n(m.T @ a)
                            a = n(m @ b)
                if training or dialect == "wrapper":
                    u.copy_(a)
                    v.copy_(b)
            results.append(w / (a @ m @ b))
        return tuple(results) if count > 1 else results[0]

    buffers = tuple(n for n in tensors if not n.startswith("weight"))
    return Call(tensors, ours, right, constants=buffers, written=buffers, options={"dims": dims, **options})


TABLE = (
    bias_act,
    pixel_norm,
    relus,
    minibatch_stddev,
    l1_similarity,
    minibatch_discrimination,
    self_attention2d,
    gradient_penalty,
    batch_norm_act,
    group_norm_act,
    instance_norm_act,
    virtual_batch_norm,
    virtual_batch_norm_statistics,
    upfirdn2d,
    fir_convolutions,
    convolutions,
    spectral_norm,
)

CONTROLS = 8  # roundings of the arguments that a computation may be worth
WIDER = (virtual_batch_norm_statistics, gradient_penalty)  # whose results are of a wider dtype than their arguments


def differentiate(function: Callable[..., Any], tensors: Tensors, call: Call, needs: list[str], cotangents: list[Tensor],
                  second: list[Tensor], order: int) -> dict[str, list[Tensor]]:  # fmt: skip
    """Results by order. A gradient that is None is zeros; one of something without a graph as well."""
    leaves = {n: t.detach().requires_grad_(n in needs) if t is not None else None for n, t in tensors.items()}
    result = function(**leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    seen = {
        "result": [y.detach() for y in outputs] + [leaves[n].clone() for n in call.written if leaves[n] is not None]
    }
    wanted = [leaves[n] for n in needs]
    if not wanted or order < 1:
        return seen
    outgoing = [c.to(y.dtype).detach().requires_grad_() for c, y in zip(cotangents, outputs)]
    live = [(y, c) for y, c in zip(outputs, outgoing) if y.requires_grad]
    ys, incoming = [y for y, _ in live], [c for _, c in live]
    grads = (
        torch.autograd.grad(ys, wanted, incoming, create_graph=order > 1, allow_unused=True)
        if live
        else [None] * len(wanted)
    )
    zeros = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted)]
    seen["gradient"] = [g.detach() for g in zeros]
    for g, w in zip(zeros, wanted):
        if g.dtype != w.dtype or g.shape != w.shape:
            raise TypeError(f"a gradient is {g.dtype}, {tuple(g.shape)} for {w.dtype}, {tuple(w.shape)}")
    curved = [(g, s) for g, s in zip(grads, second) if g is not None and g.requires_grad]
    if order > 1 and curved:
        total = sum((g * s.to(g.dtype)).double().sum() for g, s in curved)
        both = [*wanted, *outgoing]
        seconds = torch.autograd.grad(total, both, allow_unused=True)
        seen["second gradient"] = [torch.zeros_like(w) if g is None else g.detach() for g, w in zip(seconds, both)]
    elif order > 1:
        seen["second gradient"] = [torch.zeros_like(w) for w in (*wanted, *outgoing)]
    return seen


def case(seed: int) -> Problem:
    draw = Draw(seed)
    build = TABLE[seed % len(TABLE)]
    call = build(draw)
    dtype = draw.dtype()
    implementation = draw.choice((None, "auto", "cpu", "reference"))
    if os.environ.get("GANKERN_PTX") == "1":  # tests/ptx
        implementation = "triton"
    tensors: Tensors = {}
    forms = {}
    for name, t in call.tensors.items():
        if t is None:
            tensors[name] = None
            continue
        own = dtype
        if name in call.free:
            own = draw.dtype()
        elif name in call.wide and dtype in (torch.bfloat16, torch.float16):
            own = draw.choice((torch.float32, dtype))
        tensors[name], form = draw.strided(t.to(own))
        if name in call.written and form == "expanded":
            tensors[name], form = tensors[name].contiguous(), "contiguous"  # torch refuses to write to it
        forms[name] = f"{str(own).removeprefix('torch.')} {form}"
    candidates = [n for n, t in tensors.items() if t is not None and n not in call.constants]
    needs = [n for n in candidates if draw.random() < 0.7]
    order = 2 if dtype == torch.float64 or call.rounds else 0
    text = f"{build.__name__}({forms}, {call.options}, implementation={implementation}, gradients of {needs})"

    def copies(to: torch.dtype | None) -> Tensors:
        return {
            n: None if t is None else t.detach().resolve_neg().contiguous().clone().to(to or t.dtype)
            for n, t in tensors.items()
        }

    with torch.no_grad():
        shapes = call.right(**copies(torch.float64))
    shapes = [shapes] if isinstance(shapes, Tensor) else list(shapes)
    cotangents = [draw.strided(draw.values(y.shape).to(dtype))[0] for y in shapes]
    second = [draw.values(tensors[n].shape).to(dtype) for n in needs]
    arguments = (call, needs, cotangents, second, order)

    right = differentiate(call.right, copies(torch.float64), *arguments)
    before = copies(None)
    own = {n: None if t is None else t.detach().clone() if n in call.written else t for n, t in tensors.items()}
    try:
        ours = differentiate(lambda **t: call.ours(implementation, **t), own, *arguments)
    except ValueError as error:
        if implementation not in ("cpu", "triton") or "implementation" not in str(error):
            return f"{text}: {type(error).__name__}: {error}"
        implementation = None
        try:
            ours = differentiate(lambda **t: call.ours(None, **t), own, *arguments)
        except Exception as later:
            return f"{text}: {type(later).__name__}: {later}"
    except Exception as error:
        return f"{text}: {type(error).__name__}: {error}"
    for n, t in tensors.items():
        if t is not None and n not in call.written and not torch.equal(t.resolve_neg(), before[n]):
            return f"{text}: {n} was written to"
    try:
        plain = differentiate(call.right, copies(dtype), *arguments)
    except (RuntimeError, TypeError):
        plain = differentiate(call.right, copies(torch.float32), *arguments)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    # How far the formula itself moves where its arguments move by one rounding of the sums' dtype.
    controls = []
    for _ in range(3):
        moved = copies(torch.float64)
        for t in moved.values():
            if t is not None:
                t.mul_(1 + torch.finfo(accumulation).eps * draw.values(t.shape).sign())
        controls.append(differentiate(call.right, moved, *arguments))
    longest = max(t.numel() for t in tensors.values() if t is not None)
    coarsest = max((torch.finfo(t.dtype).eps for n, t in tensors.items() if t is not None and n in (*call.written, *needs)),
                   default=0.0)  # fmt: skip
    floor = max(torch.finfo(dtype).eps, coarsest) + torch.finfo(accumulation).eps * math.sqrt(max(longest, 1))
    for mode, truth in right.items():
        scale = size(truth)
        for i, (a, b) in enumerate(zip(ours[mode], truth, strict=True)):
            if mode == "result" and i < len(shapes) and a.dtype != dtype and build not in WIDER:
                return f"{text}: the result is {a.dtype}"
            error, own_error = difference(a, b), difference(plain[mode][i], b)
            own_error = (own_error if math.isfinite(own_error) else 0.0) + CONTROLS * max(
                difference(c[mode][i], b) for c in controls
            )
            if not error <= 2 * own_error + floor * scale and not _overflows(a, b):
                return f"{text}: {mode} {i} is off by {error:.2e} of {scale:.2e}; plain torch by {own_error:.2e}"
    return None


def _overflows(ours: Tensor, right: Tensor) -> bool:
    """A right value that the dtype has no number for."""
    return right.numel() > 0 and right.abs().max().item() > torch.finfo(ours.dtype).max
