"""Which node of :mod:`gankern.tangent.nodes` an ATen operator leaves on a tape.

``RULES`` has the operators that critics are made of: their linear maps are written out, so that nothing is computed for
nothing. Any other differentiable operator becomes a ``Smooth`` node. What has no defined or no single meaning for the
gradient of one sample is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gankern.core.layout import is_dense_channels_last, memory_format
from gankern.core.torch_internals import autocasting, memory_of, share_memory
from gankern.ops import convolution as _convolutions
from gankern.tangent.nodes import (
    INPUT,
    BatchNorm,
    Bilinear,
    Gate,
    Join,
    LayoutMatters,
    Linear,
    NotCovered,
    Parts,
    Smooth,
    Sum,
    scaled,
    sum_to,
)

if TYPE_CHECKING:
    from gankern.tangent.state import State
    from gankern.tangent.tape import Tape

aten = torch.ops.aten
RULES: dict[Any, Callable[..., Any]] = {}


def rule(*operators: Any) -> Any:
    """Registers a function (tape, operator, *arguments) -> the operator's result, or NotImplemented where this case
    is left to Smooth."""

    def register(function: Callable[..., Any]) -> Any:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def _linear(
    tape: Tape, x: Tensor, y: Tensor, forward: Callable[..., Any], transpose: Callable[..., Any], view: bool = False
) -> Tensor:
    tape.add(Linear(forward, transpose), (tape.find(x),), (y,), view)
    return y


# ---- convolutions and matrix products ------------------------------------------------------------------------------


@rule(aten.convolution.default)
def _convolution(tape: Tape, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
    if x.dim() != weight.dim():  # not in a batch
        return NotImplemented
    fast = None if autocasting(x.device.type) else _convolutions.options_for_torch(x, weight, options)
    if fast is not None:
        # An equalised learning rate: the engine scales the weight as it reads it, and no scaled copy has to be kept.
        weight, factor = tape.scaled_weights.get(tape.known(weight), (weight, 1.0))
        (kind, padding, scale, *rest), height, width = fast
        options = (kind, padding, scale * factor, *rest)
        forward, *_ = _convolutions.passes(options, height, width)
        return engine_convolution(tape, options, height, width, x, weight, bias, forward(x, weight, bias))
    # Each of the three other passes would lay the weight out anew.
    kept = (
        weight.contiguous(memory_format=torch.channels_last)
        if x.is_cpu and x.dim() == 4 and is_dense_channels_last(x)
        else weight
    )
    y = func(x, kept, bias, *options)
    backward = aten.convolution_backward.default

    def f(a: Any, b: Any) -> Any:
        return func(a, b, None, *options)

    def da(g: Tensor, a: Any, b: Any) -> Any:
        return backward(g, a, b, None, *options, (True, False, False))[0]

    def db(g: Tensor, a: Any, b: Any) -> Any:
        return backward(g, a, b, None, *options, (False, True, False))[1]

    return _bilinear(tape, (x, weight, bias), y, f, da, db, _per_channel(y), _sum_per_channel, kept)


def engine_convolution(
    tape: Tape, options: Any, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
) -> Any:
    """A convolution by this library's engine, ops/convolution.py, with the result y."""
    passes = _convolutions.passes(options, height, width)
    return _bilinear(tape, (x, weight, bias), y, *passes, _per_channel(y), _sum_per_channel)


def _per_channel(y: Tensor) -> Any:
    shape = y.shape
    return lambda c: c.view(-1, *[1] * (len(shape) - 2)).expand(shape)


def _sum_per_channel(g: Tensor) -> Any:
    return g.sum([0, *range(2, g.dim())])


@rule(aten.addmm.default)
def _addmm(tape: Tape, func: Any, c: Any, a: Any, b: Any, **scales: Any) -> Any:
    if scales:
        return NotImplemented
    y = func(c, a, b)
    shape, result = c.shape, y.shape
    return _bilinear(
        tape, (a, b, c), y, torch.mm, _mm_da, _mm_db, lambda t: t.expand(result), lambda g: sum_to(g, shape)
    )


@rule(aten.mm.default, aten.bmm.default)
def _mm(tape: Tape, func: Any, a: Any, b: Any) -> Any:
    return _bilinear(tape, (a, b), func(a, b), torch.matmul, _mm_da, _mm_db)


@rule(aten.mv.default, aten.dot.default)
def _mv(tape: Tape, func: Any, a: Any, b: Any) -> Any:
    if tape.kind((tape.find(a), tape.find(b))) & INPUT:
        return NotImplemented
    outer = torch.outer if a.dim() == 2 else torch.mul
    return _bilinear(
        tape,
        (a, b),
        func(a, b),
        func,
        lambda g, a, b: outer(g, b),
        lambda g, a, b: a.mT @ g if a.dim() == 2 else a * g,
    )


def _mm_da(g: Tensor, a: Any, b: Any) -> Any:
    return g @ b.mT


def _mm_db(g: Tensor, a: Any, b: Any) -> Any:
    return (g.mT @ a).mT  # a weight mostly comes as the transpose of a contiguous one


@rule(aten.mul.Tensor, aten.mul_.Tensor)
def _mul(tape: Tape, func: Any, a: Any, b: Any) -> Any:
    a_value = tape.find(a) if isinstance(a, Tensor) else None
    b_value = tape.find(b) if isinstance(b, Tensor) else None
    if a_value is None or b_value is None:
        if a_value is None:
            a, b = b, a
        x = a
        if func is aten.mul_.Tensor and a_value is None:
            raise NotCovered("a constant is multiplied in place by what depends on the input or a parameter")
        y = func(a, b)
        tape.save(b if isinstance(b, Tensor) else None)
        _scale(tape, x, y, lambda t: t * b)
        if isinstance(b, (int, float)) and y is not x and y.dtype == x.dtype and tape.known(x) in tape.parameters:
            tape.scaled_weights[tape.known(y)] = x, float(b)
        return y
    if func is aten.mul_.Tensor or a.dtype != b.dtype:
        return NotImplemented
    y, a_shape, b_shape = func(a, b), a.shape, b.shape
    return _bilinear(
        tape, (a, b), y, torch.mul, lambda g, a, b: sum_to(g * b, a_shape), lambda g, a, b: sum_to(g * a, b_shape)
    )


@rule(aten.div.Tensor, aten.div_.Tensor)
def _div(tape: Tape, func: Any, a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor) or (isinstance(b, Tensor) and tape.find(b) is not None):
        return NotImplemented
    y = func(a, b)
    tape.save(b if isinstance(b, Tensor) else None)
    return _scale(tape, a, y, lambda t: t / b)


@rule(aten.mul.Scalar, aten.mul_.Scalar, aten.div.Scalar, aten.div_.Scalar)
def _scalar(tape: Tape, func: Any, a: Any, b: Any) -> Any:
    y = func(a, b)
    function = torch.mul if func in (aten.mul.Scalar, aten.mul_.Scalar) else torch.div
    return _scale(tape, a, y, lambda t: function(t, b))


@rule(aten.neg.default, aten.neg_.default)
def _neg(tape: Tape, func: Any, x: Tensor) -> Any:
    return _scale(tape, x, func(x), torch.neg)


def _scale(tape: Tape, x: Tensor, y: Tensor, function: Callable[..., Any]) -> Any:
    """y = c x with a constant c of a shape that broadcasts."""
    shape, dtype = x.shape, x.dtype
    if y.dtype != dtype:
        kind = y.dtype
        return _linear(tape, x, y, lambda t: function(t).to(kind), lambda g: sum_to(function(g), shape).to(dtype))
    return _linear(tape, x, y, function, lambda g: sum_to(function(g), shape))


def _bilinear(
    tape: Tape,
    operands: tuple,
    y: Tensor,
    f: Callable[..., Tensor],
    da: Callable[..., Tensor],
    db: Callable[..., Tensor],
    add: Any = None,  # of a tensor, as dc; None where nothing is added
    dc: Any = None,
    kept: Tensor | None = None,
) -> Any:
    """``kept`` is what f, da and db read for the second operand, if not the operand itself."""
    ins = tuple(None if x is None else tape.find(x) for x in operands)
    if tape.kind(ins[:2]) == 0:  # only what is added depends on something
        tape.add(Linear(add, dc), ins[2:], (y,))
        return y
    a, b = operands[:2]
    node = Bilinear(f, da, db, add, dc, a, b if kept is None else kept)
    node.curved = bool(tape.kind(ins[:1]) & tape.kind(ins[1:2]) & INPUT)
    tape.add(node, ins, (y,))
    tape.save(a, b)
    return y


# ---- piecewise-linear activations and pooling ----------------------------------------------------------------------


@rule(aten.relu.default, aten.relu_.default)
def _relu(tape: Tape, func: Any, x: Tensor) -> Any:
    y = func(x)
    tape.add(Gate(aten.threshold_backward, y, 0), (tape.find(x),), (y,))
    tape.save(y)
    return y


@rule(aten.leaky_relu.default, aten.leaky_relu_.default)
def _leaky_relu(tape: Tape, func: Any, x: Tensor, slope: float = 0.01) -> Any:
    if slope < 0:  # the result does not tell the sign
        return NotImplemented
    y = func(x, slope)
    tape.add(Gate(aten.leaky_relu_backward, y, slope, True), (tape.find(x),), (y,))
    tape.save(y)
    return y


@rule(aten.rrelu_with_noise.default)
def _rrelu(
    tape: Tape,
    func: Any,
    x: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Any:
    return NotImplemented if training else _leaky_relu(tape, aten.leaky_relu.default, x, (lower + upper) / 2)


@rule(aten.native_dropout.default)
def _dropout(tape: Tape, func: Any, x: Tensor, p: float, train: bool | None) -> Any:
    y, mask = func(x, p, train)
    if train:
        factor = 0.0 if p == 1 else 1 / (1 - p)
        _linear(tape, x, y, lambda t: t * mask * factor, lambda g: g * mask * factor)
    else:
        _linear(tape, x, y, _same, _same)
    return y, mask


@rule(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def _max_pool(tape: Any, func: Any, x: Tensor, *options: Any) -> Any:
    y, indices = func(x, *options)
    if func is aten.max_pool2d_with_indices.default:
        backward, ndim = aten.max_pool2d_with_indices_backward.default, 2
    else:
        backward, ndim = aten.max_pool3d_with_indices_backward.default, 3
    defaults: list[Any] = [(), 0, 1, False]
    kernel_size, stride, padding, dilation, ceil_mode = (*options, *defaults[len(options) - 1 :])
    shape, layout = x.shape, memory_format(x)

    def forward(t: Tensor) -> Any:
        return t.flatten(-ndim).gather(-1, indices.flatten(-ndim)).view(indices.shape)

    def transpose(g: Tensor) -> Any:
        like = g.new_empty(shape).contiguous(memory_format=layout)
        return backward(g, like, kernel_size, stride, padding, dilation, ceil_mode, indices)

    tape.add(Linear(forward, transpose), (tape.find(x),), (y,))
    return y, indices


@rule(aten.avg_pool2d.default)
def _avg_pool2d(
    tape: Tape,
    func: Any,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    *rest: Any,
) -> Any:
    y = func(x, kernel_size, stride, padding, *rest)
    kernel, step, pad = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding)
    tiles = (
        x.dim() == 4 and kernel == step and pad == [0, 0] and not any(r is not False and r is not True for r in rest)
    )
    if tiles and all(size % k == 0 for size, k in zip(x.shape[2:], kernel)):
        area, size = kernel[0] * kernel[1], list(x.shape[2:])

        def transpose(g: Tensor) -> Any:
            return aten.upsample_nearest2d.default(g / area, size)
    else:
        shape = x.shape

        def transpose(g: Tensor) -> Any:
            options = (*rest, *(False, True, None)[len(rest) :])
            like = g.new_empty(()).expand(shape)
            return aten.avg_pool2d_backward.default(g, like, kernel, step, pad, *options)

    return _linear(tape, x, y, lambda t: func(t, kernel_size, stride, padding, *rest), transpose)


def _pair(x: Sequence[int]) -> Any:
    return list(x) * 2 if len(x) == 1 else list(x)


# ---- sums ----------------------------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
def _add(tape: Tape, func: Any, a: Any, b: Any, alpha: float = 1) -> Any:
    sign = 1 if func in (aten.add.Tensor, aten.add_.Tensor) else -1
    return _sum(tape, (a, b), func(a, b, alpha=alpha), (1, sign * alpha))


@rule(aten.add.Scalar, aten.sub.Scalar, aten.add_.Scalar, aten.sub_.Scalar)
def _add_scalar(tape: Tape, func: Any, a: Any, b: Any, alpha: float = 1) -> Any:
    return _sum(tape, (a,), func(a, b, alpha), (1,))


@rule(aten.rsub.Scalar)
def _rsub(tape: Tape, func: Any, a: Any, b: Any, alpha: float = 1) -> Any:
    return _sum(tape, (a,), func(a, b, alpha), (-alpha,))


@rule(aten.lerp.Scalar, aten.lerp_.Scalar)
def _lerp(tape: Tape, func: Any, a: Any, b: Any, weight: float) -> Any:
    return _sum(tape, (a, b), func(a, b, weight), (1 - weight, weight))


def _sum(tape: Tape, terms: Sequence[Tensor], y: Tensor, factors: Sequence[float]) -> Any:
    ins = tuple(tape.find(x) if isinstance(x, Tensor) else None for x in terms)
    if y is terms[0] and ins[0] is None:
        raise NotCovered("what depends on the input or a parameter is added in place to a constant")
    if any(i is not None and x.dtype != y.dtype for i, x in zip(ins, terms)):
        return _casting_sum(tape, terms, ins, y, factors)
    shapes = [x.shape if isinstance(x, Tensor) else None for x in terms]
    tape.add(Sum(y.shape, shapes, factors), ins, (y,))
    return y


def _casting_sum(
    tape: Tape, terms: Sequence[Tensor], ins: Sequence[int | None], y: Tensor, factors: Sequence[float]
) -> Any:
    shapes = [x.shape if isinstance(x, Tensor) else () for x in terms]
    dtypes = [x.dtype if isinstance(x, Tensor) else None for x in terms]
    shape, dtype = y.shape, y.dtype

    def forward(tangents: Sequence[Tensor]) -> Any:
        total: Any = sum(scaled(t, c) for t, c in zip(tangents, factors))
        return total.to(dtype).expand(shape)

    def transpose(g: Tensor) -> Any:
        return [
            None if i is None else scaled(sum_to(g, shape), c).to(dtype)
            for i, shape, dtype, c in zip(ins, shapes, dtypes, factors)
        ]

    tape.add(Join(forward, transpose, shapes), ins, (y,))
    return y


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def _reduce(
    tape: Tape, func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    arguments = () if func in (aten.sum.default, aten.mean.default) else (dim, keepdim)
    y = func(x, *arguments, dtype=dtype)
    shape, kind = x.shape, x.dtype
    dims = sorted(d % len(shape) for d in dim) if dim and len(shape) else list(range(len(shape)))
    count = 1
    if func in (aten.mean.dim, aten.mean.default):
        for d in dims:
            count *= shape[d]

    def transpose(g: Tensor) -> Any:
        if not keepdim:
            for d in dims:
                g = g.unsqueeze(d)
        g = g if count == 1 else g / count
        return g.to(kind).expand(shape)

    return _linear(tape, x, y, lambda t: func(t, *arguments, dtype=dtype), transpose)


# ---- shapes --------------------------------------------------------------------------------------------------------


def _same(x: Tensor) -> Any:
    return x


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default)
def _view(tape: Tape, func: Any, x: Tensor, *arguments: Any) -> Any:
    shape = x.shape
    y = view(func, x, *arguments)
    result = y.shape
    return _linear(tape, x, y, lambda t: t.reshape(result), lambda g: g.reshape(shape), view=True)


def view(func: Any, x: Tensor, *arguments: Any) -> Any:
    """The operator's result, or a copy where the tape's memory format, unlike the caller's, has no such view."""
    try:
        return func(x, *arguments)
    except RuntimeError:
        if func is not aten.view.default or not isinstance(arguments[0], (list, tuple)):
            raise
        return x.reshape(arguments[0])


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def _squeeze(tape: Tape, func: Any, x: Tensor, *arguments: Any) -> Any:
    return _view(tape, func, x, *arguments)


@rule(aten.alias.default)
def _alias(tape: Tape, func: Any, x: Tensor) -> Any:
    return _linear(tape, x, func(x), _same, _same, view=True)


@rule(aten.t.default, aten.transpose.int)
def _transpose(tape: Tape, func: Any, x: Tensor, *dims: Any) -> Any:
    return _linear(tape, x, func(x, *dims), lambda t: func(t, *dims), lambda g: func(g, *dims), view=True)


@rule(aten.permute.default)
def _permute(tape: Tape, func: Any, x: Tensor, dims: Any) -> Any:
    inverse = [0] * len(dims)
    for i, d in enumerate(dims):
        inverse[d % len(dims)] = i
    return _linear(tape, x, func(x, dims), lambda t: t.permute(dims), lambda g: g.permute(inverse), view=True)


@rule(aten.expand.default)
def _expand(tape: Tape, func: Any, x: Tensor, size: Sequence[int], **options: Any) -> Any:
    shape = x.shape
    y = func(x, size, **options)
    return _linear(tape, x, y, lambda t: t.expand(size), lambda g: sum_to(g, shape), view=True)


@rule(aten.slice.Tensor)
def _slice(
    tape: Tape, func: Any, x: Tensor, dim: Any = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    shape = x.shape
    y = func(x, dim, start, end, step)
    start, end = 0 if start is None else start, shape[dim] if end is None else end
    return _linear(
        tape,
        x,
        y,
        lambda t: func(t, dim, start, end, step),
        lambda g: aten.slice_backward.default(g, shape, dim, start, end, step),
        view=True,
    )


@rule(aten.select.int)
def _select(tape: Tape, func: Any, x: Tensor, dim: Any, index: int) -> Any:
    shape = x.shape
    return _linear(
        tape,
        x,
        func(x, dim, index),
        lambda t: func(t, dim, index),
        lambda g: aten.select_backward.default(g, shape, dim, index),
        view=True,
    )


@rule(aten.clone.default)
def _clone(tape: Tape, func: Any, x: Tensor, **options: Any) -> Any:
    if x.is_conj() or x.is_neg():
        raise NotCovered(_LATER.format(func))
    return _linear(tape, x, func(x, **options), _same, _same)


@rule(aten._to_copy.default)
def _to_copy(tape: Tape, func: Any, x: Tensor, **options: Any) -> Any:
    y = func(x, **options)
    if not y.is_floating_point():
        return y
    here, there = (x.dtype, x.device), (y.dtype, y.device)
    return _linear(tape, x, y, lambda t: t.to(there[1], there[0]), lambda g: g.to(here[1], here[0]))


@rule(aten.constant_pad_nd.default)
def _pad(tape: Tape, func: Any, x: Tensor, pad: Sequence[int], value: float | None = 0) -> Any:
    back = [-p for p in pad]
    return _linear(tape, x, func(x, pad, value), lambda t: func(t, pad, 0), lambda g: func(g, back, 0))


@rule(aten.cat.default, aten.stack.default)
def _cat(tape: Tape, func: Any, tensors: Any, dim: Any = 0) -> Any:
    y = func(tensors, dim)
    if any(x.dtype != y.dtype or x.dim() == 1 != y.dim() for x in tensors):
        return NotImplemented
    if func is aten.stack.default:

        def transpose(g: Tensor) -> Any:
            return g.unbind(dim)
    else:
        sizes = [x.shape[dim] for x in tensors]

        def transpose(g: Tensor) -> Any:
            return g.split(sizes, dim)

    node = Join(lambda parts: func(parts, dim), transpose, [x.shape for x in tensors])
    tape.add(node, tuple(tape.find(x) for x in tensors), (y,))
    return y


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _split(tape: Tape, func: Any, x: Tensor, *arguments: Any) -> Any:
    parts = func(x, *arguments)
    dim = (*arguments, 0)[0 if func is aten.unbind.int else 1]
    join = torch.stack if func is aten.unbind.int else torch.cat
    node = Parts(lambda t: func(t, *arguments), lambda grads: join(grads, dim), [p.shape for p in parts])
    tape.add(node, (tape.find(x),), parts, view=True)
    return parts


# ---- in-place changes of a shape -------------------------------------------------------------------------------------


@rule(aten.squeeze_.default, aten.squeeze_.dim, aten.squeeze_.dims, aten.unsqueeze_.default)
def _squeeze_(tape: Tape, func: Any, x: Tensor, *arguments: Any) -> Any:
    before = x.shape
    func(x, *arguments)
    after = x.shape
    return _reshaped(tape, x, lambda t: t.reshape(after), lambda g: g.reshape(before))


@rule(aten.t_.default, aten.transpose_.default)
def _transpose_(tape: Tape, func: Any, x: Tensor, *dims: Any) -> Any:
    func(x, *dims)
    functional = aten.t.default if func is aten.t_.default else aten.transpose.int
    return _reshaped(tape, x, lambda t: functional(t, *dims), lambda g: functional(g, *dims))


def _reshaped(tape: Tape, x: Tensor, forward: Callable[..., Any], transpose: Callable[..., Any]) -> Any:
    """x is a new value of the same memory, which nobody has written."""
    tape.add(Linear(forward, transpose), (tape.find(x),), (x,), view=True)
    return x


# Rules that hold for complex tensors as they stand; all others would have to conjugate, which Smooth nodes do.
OF_SHAPES = {
    *(_view, _squeeze, _squeeze_, _alias, _transpose, _transpose_, _permute, _expand, _slice, _select, _clone),
    *(_cat, _split),
}


# ---- all other operators -------------------------------------------------------------------------------------------

# The result depends on the shape of its argument alone.
SHAPE_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "is_same_size", "detach", "detach_"),
    *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
}
# Their results follow from how an argument lies in memory, which for an input of the tape is not as the caller's.
LAYOUT = {"as_strided", "as_strided_", "as_strided_scatter", "set_", "resize_", "resize_as_"}
# Views that whoever reads them has to resolve, which torch does where autograd no longer sees it.
CONJUGATED = {"_conj", "_neg_view"}
_LATER = "{} conjugates or negates a value where autograd no longer sees it"
# Linear in their first argument, which is all that depends on anything: they keep nothing.
LINEAR = {
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")),
    *("upsample_trilinear3d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im", "reflection_pad1d"),
    *("reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d"),
    *("avg_pool1d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "flip", "roll", "repeat", "cumsum"),
    *("diagonal", "unfold", "tril", "triu", "index_select", "take_along_dim"),
}
# Operators without curvature: linear in pieces, their masks and places apart. Of each, the sets of arguments in which
# it is so jointly: where those that depend on the input are within one of the sets, there is none. An operator or a set
# that is missing here costs time, one too many would be wrong.
FLAT: dict[str, tuple[set[int], ...]] = {
    **{name: ({0},) for name in LINEAR},
    **dict.fromkeys(
        [
            *("abs", "hardtanh", "threshold", "leaky_relu", "relu6", "max", "min", "amax", "amin", "hardshrink"),
            *("softshrink", "adaptive_max_pool2d", "adaptive_max_pool3d", "sort", "topk", "median", "kthvalue"),
            *("sign", "floor", "ceil", "round", "trunc", "index", "gather", "embedding", "rrelu_with_noise"),
        ],
        ({0},),
    ),
    **dict.fromkeys(["maximum", "minimum", "clamp_min", "clamp_max", "slice_scatter", "select_scatter"], ({0, 1},)),
    "clamp": ({0, 1, 2},),
    "where": ({1, 2},),
    **dict.fromkeys(["masked_fill", "masked_scatter", "index_put"], ({0, 2},)),
    "scatter_add": ({0, 3},),
    "lerp": ({0, 1}, {2}),
    "_prelu_kernel": ({0}, {1}),
}
_BATCH_NORM = (
    "batch norm in training mode: a sample's gradient depends on the other samples, and the penalty is not per sample "
    "(use layer or instance norm, or eval mode)"
)
BATCH_NORM = {
    *("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "_batch_norm_no_update"),
    *("cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training"),
}
# y = (x - mean) / sqrt(var + eps) weight + bias of (x, weight, bias, mean, var): by constant statistics.
_FLAT_BATCH_NORM = ({0, 2, 3}, {1, 2})


# The same of this library's primitives, by their options and the tensors that depend on the input.
FLAT_PRIMITIVES: dict[str, Callable[[tuple], tuple[set[int], ...]]] = {
    "bias_act": lambda options: () if options[1].curved else ({0, 1},),
    "bias_act, prelu": lambda options: ({0, 1}, {2}),
    "batch_norm_act": lambda options: () if options[1] else ({0, 2}, {1, 2}),  # () in training
}


def _is_flat(sets: Sequence[set[int]], active: set) -> bool:
    return any(active <= jointly for jointly in sets)


def curved_primitive(tape: Tape, name: str, options: tuple, values: Sequence[int | None]) -> bool:
    active = {i for i, value in enumerate(values) if value is not None and tape.kinds[value] & INPUT}
    flat = FLAT_PRIMITIVES.get(name)
    return bool(active) and not (flat is not None and _is_flat(flat(options), active))


def check_primitive(name: str, options: tuple, x: Tensor | None) -> None:
    if name == "batch_norm_act" and options[1] and x is not None and x.shape[0] > 1:
        raise NotCovered(_BATCH_NORM)


@cache
def _traits(func: Any) -> tuple[str, str, tuple[int, ...], bool, bool]:
    """Namespace, name, the places of the arguments that it writes, whether it draws random numbers, returns a view."""
    schema = func._schema
    namespace, name = schema.name.split("::")
    view = bool(schema.returns) and schema.returns[0].alias_info is not None
    written = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    return namespace, name, written, torch.Tag.nondeterministic_seeded in func.tags, view and not written


@cache
def gives_numbers(func: Any) -> bool:
    """Whether an operator, such as item(), neither returns nor writes a tensor: its result is a constant to anybody."""
    schema = func._schema
    return not schema.is_mutable and not any("Tensor" in str(x.type) for x in schema.returns)


# They write down which graph's backward they wait for. This, to the profiler, is the first that they do: a critic that
# is left later, in the middle of that, leaves half of it.
BOOKKEEPERS = ("DistributedDataParallel.forward", "FullyShardedDataParallel.forward")


def number(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator of :func:`gives_numbers`."""
    if args and isinstance(args[0], str) and args[0] in BOOKKEEPERS:
        raise NotCovered(f"{args[0]} runs, which waits for the backward of the graph that it makes")
    return func(*args, **kwargs)


def tensors_of(args: Sequence, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors among an operator's arguments."""
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (y for y in x if isinstance(y, Tensor))
    if kwargs:
        yield from tensors_of(tuple(kwargs.values()), {})


def _complex(args: Sequence, kwargs: Mapping[str, Any]) -> bool:
    """Whether a tensor, a number or a dtype among an operator's arguments is complex."""
    if any(isinstance(x, complex) or (isinstance(x, torch.dtype) and x.is_complex) for x in args):
        return True
    return any(x.is_complex() for x in tensors_of(args, {})) or (bool(kwargs) and _complex(tuple(kwargs.values()), {}))


def tell(before: State, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tells ``before`` of tensors and generators that the operator is about to change; whether it makes new ones."""
    _, _, written, random, view = _traits(func)
    if written:
        names = func._schema.arguments
        for x in tensors_of([args[i] if i < len(args) else kwargs.get(names[i].name) for i in written], {}):
            if not x.requires_grad:  # else the tape refuses it, or knows it as a value of its own
                before.about_to_write(x)
    if random:
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Generator):
                before.about_to_draw(x)
    return not written and not view


def untracked(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator on constants, or within no_grad: its result is a constant."""
    _, name, written, random, _ = _traits(func)
    if written:
        for x in tensors_of(args, kwargs) if written[-1] >= len(args) else tensors_of([args[i] for i in written], {}):
            if x.requires_grad:
                raise NotCovered(f"{func} writes within no_grad to what depends on the input or a parameter")
            if tape.detached and x.layout == torch.strided and x.untyped_storage().data_ptr() in tape.detached:
                raise NotCovered(f"{func} writes through .data to what depends on the input or a parameter")
    if tape.relaid:
        _check_layout(tape, func, name, written, random, args)
    result = view(func, *args) if func is aten.view.default else func(*args, **kwargs)
    if tape.relaid:
        tape.of_layout.update(memory_of(x) for x in tensors_of(args, kwargs) if x.requires_grad)
        _check_copy(tape, func, kwargs, result)
    return result


def _check_copy(tape: Tape, func: Any, kwargs: Mapping[str, Any], result: Any) -> None:
    """Whether this may be a copy because of the tape's layout: for the caller's it could be the tensor itself."""
    laid_out = kwargs.get("memory_format", torch.preserve_format) != torch.preserve_format
    if laid_out and func in (aten.clone.default, aten._to_copy.default):
        tape.of_layout.add(memory_of(result))


def _check_layout(
    tape: Tape, func: Any, name: str, written: tuple[int, ...], random: bool, args: Sequence[Any]
) -> None:
    """What reads or fills memory in the order in which it lies must find it as the caller laid it out. So must what
    writes where it depends on the layout who sees it: to a copy, or to what another layout would have copied."""
    if written and tape.of_layout and any(memory_of(x) in tape.of_layout for x in tensors_of(args, {})):
        raise LayoutMatters(f"{func} writes to what another layout in memory would have copied, or would not")
    if name in LAYOUT or (random and any(not x.is_contiguous() for x in tensors_of(args, {}))):
        raise LayoutMatters(f"{func} depends on the input's layout in memory")


def _reads_what_it_writes(args: Sequence[Any]) -> bool:
    """Whether another argument of an operator in place has the memory of the first: it is gone afterwards."""
    target, *others = tensors_of(args, {})
    return any(share_memory(target, x) for x in others)


def record(tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result; it touches the inputs or a parameter."""
    namespace, name, written, random, view = _traits(func)
    if tape.relaid:
        _check_layout(tape, func, name, written, random, args)
    if written and _reads_what_it_writes(args):
        raise NotCovered(f"{func} reads the memory that it writes")
    if name in SHAPE_ONLY or namespace == "prim":
        if tape.relaid and name in ("detach", "detach_"):
            tape.of_layout.add(memory_of(args[0]))
        return func(*args, **kwargs)
    if namespace != "aten":
        raise NotCovered(f"the operator {func} is not one that this form knows")
    if name in CONJUGATED:
        raise NotCovered(_LATER.format(func))
    result = _by_rule(tape, func, args, kwargs, name, written, random, view)
    if tape.relaid:
        _check_copy(tape, func, kwargs, result)
    return result


def _by_rule(
    tape: Tape,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    name: str,
    written: tuple[int, ...],
    random: bool,
    view: bool,
) -> Any:
    known = RULES.get(func)
    if known is not None and (known in OF_SHAPES or not _complex(args, kwargs)):
        result = known(tape, func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    if name in ATTENTION:
        raise NotCovered(f"{func} has no second derivative; {ATTENTION_ADVICE}")
    if random:
        raise NotCovered(f"{func} draws random numbers by what depends on the input")
    if name in BATCH_NORM:
        _check_batch_norm(name, args)
    return _other(tape, func, args, kwargs, name, bool(written), view)


# torch's fused attention kernels.
ATTENTION = {
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward", "_efficient_attention_forward"),
}
ATTENTION_ADVICE = (
    "call the penalty within torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), where it has one"
)


def _check_batch_norm(name: str, args: Sequence[Any]) -> Any:
    if name in ("_batch_norm_no_update", "_native_batch_norm_legit_no_training"):
        return
    training = name == "_batch_norm_with_update" or next(a for a in args[3:] if isinstance(a, bool))
    if training and args[0].shape[0] > 1:  # instance norm comes as the batch norm of one sample
        raise NotCovered(_BATCH_NORM)


def _other(
    tape: Tape, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, mutable: bool, view: bool
) -> Any:
    """Any differentiable operator: a Smooth node."""
    label = str(func)
    target = None
    if mutable:
        if not name.endswith("_") or name.endswith("__") or "out" in kwargs:
            raise NotCovered(f"{label} writes to an argument")
        target = args[0]
        if tape.find(target) is None:
            raise NotCovered(f"{label} writes what depends on the input or a parameter into a constant")
        name = name[:-1]
        func = _functional(func, name)
        if func is None or name in ("copy", "set", "resize", "zero", "fill"):
            raise NotCovered(f"{label} writes in place")
        args = (target.clone(), *args[1:])
        tape.mark(args[0], tape.find(target))
        args[0].requires_grad_()
    places, tensors = [], []  # of what is tracked
    for key, x in [*enumerate(args), *kwargs.items()]:
        for j, y in enumerate(x) if isinstance(x, (list, tuple)) else [(None, x)]:
            if isinstance(y, Tensor) and y.requires_grad:
                places.append((key, j))
                tensors.append(y)
    values: list[Any] = [tape.find(x) for x in tensors]  # of each there is one

    result = func(*args, **kwargs)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result) if isinstance(result, (tuple, list)) else ()
    outputs = tuple(y if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()) else None for y in outputs)
    if any(y is not None and y.layout != torch.strided for y in outputs):
        raise NotCovered(f"{label} makes a sparse tensor")
    if all(y is None for y in outputs):
        return result  # numbers, comparisons and indices, which autograd takes for constants too
    if target is not None:
        if target.shape != result.shape or target.dtype != result.dtype:
            raise NotCovered(f"{label} changes a tensor's shape in place")
        target.copy_(result)
        outputs = (target,)
        result = target

    active = {key for (key, _), value in zip(places, values) if tape.kinds[value] & INPUT}
    if name in LINEAR and places == [(0, None)] and len(outputs) == 1 and not outputs[0].is_complex():
        shape, rest = args[0].shape, args[1:]
        node: Any = Linear(lambda t: func(t, *rest, **kwargs), _transposed(func, shape, rest, kwargs))
    else:
        sets = FLAT.get(name, ()) if name not in BATCH_NORM or _training(name, args) else _FLAT_BATCH_NORM
        curved = bool(active) and (_complex(args, kwargs) or not _is_flat(sets, active))  # abs of a complex number
        if name in BATCH_NORM:  # which writes running statistics, and must not write them again
            again = tuple(x.clone() if i in (3, 4) and isinstance(x, Tensor) else x for i, x in enumerate(args))
            node = BatchNorm(_with_holes(func, again, kwargs, places), tensors, curved, label)
        else:
            node = Smooth(_with_holes(func, args, kwargs, places), tensors, curved, label)
        tape.save(*tensors_of(args, kwargs))
    tape.add(node, tuple(values), outputs, view)
    return result


@cache
def _functional(func: Any, name: str) -> Any:
    """The operator that returns what func writes to its first argument; of one name may be others."""
    packet = getattr(aten, name, None)
    takes = [(str(a.type), a.kwarg_only) for a in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        functional = getattr(packet, overload)
        if [(str(a.type), a.kwarg_only) for a in functional._schema.arguments] == takes:
            return functional
    return None


def _with_holes(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], places: Sequence[tuple[Any, int | None]]
) -> Callable[..., Sequence]:
    """func as a function of the tensors at these places; it keeps the other arguments alone."""

    def fill(tensors: Sequence[Tensor | None]) -> tuple[list, dict]:
        full = [list(x) if isinstance(x, (list, tuple)) else x for x in args]
        named = {name: list(x) if isinstance(x, (list, tuple)) else x for name, x in kwargs.items()}
        for (key, j), x in zip(places, tensors):
            into = full if isinstance(key, int) else named
            if j is None:
                into[key] = x
            else:
                into[key][j] = x
        return full, named

    args, kwargs = fill([None] * len(places))

    def function(*tensors: Tensor | None) -> Any:
        full, named = fill(tensors)
        y = func(*full, **named)
        return (y,) if isinstance(y, Tensor) else y

    return function


def _training(name: str, args: Sequence[Any]) -> bool:
    return name == "_batch_norm_with_update" or any(a is True for a in args[3:])


def _transposed(func: Any, shape: torch.Size, rest: Any, kwargs: Mapping[str, Any]) -> Any:
    def transpose(g: Tensor) -> Any:
        with torch.enable_grad():
            x = g.new_zeros(()).expand(shape).requires_grad_()
            return torch.autograd.grad(func(x, *rest, **kwargs), x, g)[0]

    return transpose
