"""The operations on tensors that :mod:`gankern.acceleration._read` knows: what each makes of values, and by which names
torch has it. One that is called in another way than is known here raises :class:`Unknown`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from gankern.acceleration._expressions import (
    INPUT,
    Axis,
    Joined,
    Node,
    Value,
    bound_axes,
    fixed,
    leaves,
    node,
    number,
    ordered,
    pointwise,
    raise_unless,
    reduced,
    stripped,
)

if TYPE_CHECKING:
    from gankern.acceleration._read import Reader


def _elementwise(name: str, arity: int) -> Callable[..., Value]:
    if arity == 1:
        return lambda reader, x: reader.made(node(name, reader.value(x).node), reader.value(x).dims)

    def run(reader: Reader, x: Any, other: Any) -> Value:
        operands = [reader.current(v) if isinstance(v, Value) else v for v in (x, other)]
        values = [v for v in operands if isinstance(v, Value)]
        raise_unless(bool(values), "an operation without a tensor")
        raise_unless(all(isinstance(v, Value) or type(v) in (int, float) for v in operands), "an operand of its own")
        pair = _pair(reader, name, *values) if len(values) == 2 else None
        if pair is not None:
            return pair
        operands = _aligned(operands)
        values = [v for v in operands if isinstance(v, Value)]
        nodes = [v.node if isinstance(v, Value) else number(v) for v in operands]
        return reader.made(pointwise(name, *nodes), reader.broadcast(values))

    return run


def _own_vector(value: Value) -> int | None:
    """The dimension along which a vector of the module's own lies; None for anything else."""
    of = value.node[1] if value.node[0] == "constant" else value.node
    labelled = [d for d, axes in enumerate(value.dims) if axes]
    return labelled[0] if of[0] == "tensor" and of[1] != INPUT and len(labelled) == 1 else None


def _aligned(operands: list[Any]) -> list[Any]:
    """With a vector of the module's own (a bias) along the other operand's dimension."""
    if len(operands) != 2 or not all(isinstance(v, Value) for v in operands):
        return operands
    for own, other in ((0, 1), (1, 0)):
        vector, value = operands[own], operands[other]
        at = _own_vector(vector)
        if at is None or _own_vector(value) is not None or len(vector.dims) - at > len(value.dims):
            continue
        axes = value.dims[at - len(vector.dims)]
        if not axes or not all(tensor for tensor, _, _ in axes) or math.prod(n for *_, n in axes) != vector.shape[at]:
            continue
        dims = tuple(axes if d == at else () for d in range(len(vector.dims)))
        aligned = Value(node("along", vector.node, vector.dims[at], axes), dims)
        return [aligned, value] if own == 0 else [value, aligned]
    return operands


def _pair(reader: Reader, name: str, a: Value, b: Value) -> Value | None:
    """Each element of an axis with each: a - b of one value that lies along two dimensions."""
    if name != "sub" or a.node is not b.node or len(a.dims) != len(b.dims) or a.dims == b.dims:
        return None
    apart = [i for i, (x, y) in enumerate(zip(a.dims, b.dims)) if x != y]
    raise_unless(len(apart) == 2, "a combination of a tensor's elements with each other")
    rows = [i for i in apart if a.dims[i] and not b.dims[i]]
    columns = [i for i in apart if b.dims[i] and not a.dims[i]]
    raise_unless(
        len(rows) == len(columns) == 1 and a.dims[rows[0]] == b.dims[columns[0]] and len(a.dims[rows[0]]) == 1,
        "a combination of a tensor's elements with each other",
    )
    (axis,) = a.dims[rows[0]]
    dims = list(a.dims)
    # Which is which does not matter to a distance, and nothing but a distance is recognised.
    dims[rows[0]], dims[columns[0]] = ((f"row of {axis[0]}", *axis[1:]),), ((f"column of {axis[0]}", *axis[1:]),)
    return reader.made(node("pairs", a.node, axis), dims)


def _dims(value: Value, dim: Any) -> list[int]:
    rank = len(value.dims)
    if dim is None:
        return list(range(rank))
    found = [dim] if type(dim) is int else list(dim)
    raise_unless(all(type(d) is int and -rank <= d < rank for d in found), "a dimension that does not exist")
    return [d % rank for d in found] if found else list(range(rank))


def _split(value: Value, dim: Any, keepdim: bool) -> tuple[tuple[Axis, ...], list[tuple[Axis, ...]]]:
    """The axes of these dimensions, and the other dimensions."""
    gone = _dims(value, dim)
    raise_unless(len(set(gone)) == len(gone) and type(keepdim) is bool, "a dimension twice")
    axes = [axis for d in gone for axis in value.dims[d]]
    raise_unless(all(tensor for tensor, _, _ in axes), "a sum over copies")
    kept = [() if d in gone else value.dims[d] for d in range(len(value.dims)) if keepdim or d not in gone]
    return bound_axes(axes), kept


def _reduction(name: str) -> Callable[..., Value]:
    def run(reader: Reader, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
        value = reader.value(x)
        axes, kept = _split(value, dim, keepdim)
        return reader.made(reduced(name, value.node, axes), kept)

    return run


def _variance(name: str) -> Callable[..., Value]:
    def run(
        reader: Reader, x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, correction: Any = None
    ) -> Value:
        value = reader.value(x)
        if isinstance(dim, bool):  # var(x, unbiased)
            dim, unbiased = None, dim
        raise_unless(unbiased in (None, True, False) and (unbiased is None or correction is None), "a variance")
        correction = correction if correction is not None else 1 if unbiased in (None, True) else 0
        raise_unless(correction in (0, 1), "a variance with another correction")
        axes, kept = _split(value, dim, keepdim)
        return reader.made(node(name, value.node, axes, int(correction)), kept)

    return run


def _norm(reader: Reader, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Value:
    value = reader.value(x)
    raise_unless(p in (2, "fro", None) and not isinstance(p, bool), "another norm")
    axes, kept = _split(value, dim, keepdim)
    return reader.made(node("norm", value.node, axes), kept)


def _normalize(reader: Reader, x: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Value:
    value = reader.value(x)
    raise_unless(p == 2 and type(eps) in (int, float) and type(dim) is int, "another normalisation")
    axes, _ = _split(value, dim, False)
    length = node("largest", node("norm", value.node, axes), number(eps))
    return reader.made(node("div", value.node, length), value.dims)


def _matmul(reader: Reader, x: Any, other: Any) -> Value:
    a, b = reader.value(x), reader.value(other)
    raise_unless(1 <= len(a.dims) <= 2 and 1 <= len(b.dims) <= 2, "a product of more than matrices")
    left, right = a.dims[-1], b.dims[0]
    raise_unless(a.shape[-1] == b.shape[0], "a product of sizes that do not fit")
    raise_unless(all(t for t, _, _ in (*left, *right)), "a product of copies")
    return reader.made(_network((a.node, left), (b.node, right)), (*a.dims[:-1], *b.dims[1:]))


def _network(a: tuple[Node, tuple[Axis, ...]], b: tuple[Node, tuple[Axis, ...]]) -> Node:
    """A sum of products over one index, in whichever order several of them are taken."""
    operands: list[Node] = []
    links = [tuple(sorted((a[1], b[1])))]
    for each, _ in (a, b):
        operands += each[1] if each[0] == "network" else [each]
        links += each[2] if each[0] == "network" else []
    raise_unless(len({stripped(o, {}) for o in operands}) == len(operands), "a tensor multiplied by itself")
    return node("network", ordered(*operands), tuple(sorted(links)))


def _flat_sizes(sizes: tuple[Any, ...]) -> list[int]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)


def _expand(reader: Reader, x: Any, *sizes: Any) -> Value:
    value, shape = reader.value(x), _flat_sizes(sizes)
    dims, new = list(value.dims), len(shape) - len(value.dims)
    raise_unless(new >= 0 and all(type(n) is int for n in shape), "an expansion")
    dims = [()] * new + dims
    for i, size in enumerate(shape):
        has = math.prod(n for _, _, n in dims[i])
        if size in (-1, has):
            raise_unless(size > 0 or i >= new, "an expansion")
        else:
            raise_unless(has == 1 and size > 0, "an expansion")
            dims[i] = (("", 0, size),)
    return reader.view(x, dims)


def _repeat(reader: Reader, x: Any, *sizes: Any) -> Value:
    value, times = reader.value(x), _flat_sizes(sizes)
    new = len(times) - len(value.dims)
    raise_unless(new >= 0 and all(type(n) is int and n > 0 for n in times), "a repetition")
    dims = [*[()] * new, *value.dims]
    return reader.made(value.node, [(("", 0, n), *axes) for n, axes in zip(times, dims)])


def _permute(reader: Reader, x: Any, *order: Any) -> Value:
    value, places = reader.value(x), _flat_sizes(order)
    rank = len(value.dims)
    raise_unless(sorted(d % rank for d in places if type(d) is int) == list(range(rank)), "a permutation")
    return reader.view(x, [value.dims[d % rank] for d in places])


def _transpose(reader: Reader, x: Any, dim0: int, dim1: int) -> Value:
    rank = len(reader.value(x).dims)
    raise_unless(all(type(d) is int and -rank <= d < rank for d in (dim0, dim1)), "a permutation")
    order = list(range(rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(reader, x, *order)


def _t(reader: Reader, x: Any) -> Value:
    rank = len(reader.value(x).dims)
    raise_unless(rank <= 2, "a transpose of more than a matrix")
    return _permute(reader, x, *range(rank)[::-1])


def _squeeze(reader: Reader, x: Any, dim: Any = None) -> Value:
    shape = reader.value(x).shape
    gone = [d for d in _dims(reader.value(x), dim) if shape[d] == 1]
    return reader.reshaped(x, [n for d, n in enumerate(shape) if d not in gone])


def _unsqueeze(reader: Reader, x: Any, dim: int) -> Value:
    shape = list(reader.value(x).shape)
    raise_unless(type(dim) is int and -len(shape) - 1 <= dim <= len(shape), "a dimension that does not exist")
    shape.insert(dim % (len(shape) + 1), 1)
    return reader.reshaped(x, shape)


def _view(reader: Reader, x: Any, *shape: Any) -> Value:
    raise_unless(isinstance(x, Value), "a view of something that is not a tensor")
    return reader.reshaped(x, _flat_sizes(shape))


def _reshape(reader: Reader, x: Any, *shape: Any) -> Value:
    return _view(reader, x, *shape)


def _flatten(reader: Reader, x: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    shape = list(reader.value(x).shape)
    raise_unless(type(start_dim) is int and type(end_dim) is int and bool(shape), "a view")
    start, end = start_dim % len(shape), end_dim % len(shape)
    return reader.reshaped(x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


def _unflatten(reader: Reader, x: Any, dim: int, sizes: Any) -> Value:
    shape = list(reader.value(x).shape)
    raise_unless(type(dim) is int and isinstance(sizes, (tuple, list)) and -1 not in sizes, "a view")
    raise_unless(math.prod(sizes) == shape[dim], "a view")
    at = dim % len(shape)
    return reader.reshaped(x, [*shape[:at], *sizes, *shape[at + 1 :]])


def _expand_as(reader: Reader, x: Any, other: Any) -> Value:
    return _expand(reader, x, *reader.value(other).shape)


def _view_as(reader: Reader, x: Any, other: Any) -> Value:
    return _view(reader, x, *reader.value(other).shape)


def _size(reader: Reader, x: Any, dim: Any = None) -> Any:
    shape = reader.value(x).shape
    if dim is None:
        return shape
    raise_unless(type(dim) is int and -len(shape) <= dim < len(shape), "a dimension that does not exist")
    return shape[dim]


def _cat(reader: Reader, tensors: Any, dim: int = 0) -> Joined:
    raise_unless(isinstance(tensors, (tuple, list)) and type(dim) is int, "a torch.cat")
    parts = tuple(reader.value(x) for x in tensors)
    raise_unless(len({len(p.dims) for p in parts}) == 1 and not reader.no_grad, "a torch.cat")
    return Joined(parts, dim % len(parts[0].dims))


def _activation(name: str, slope: float | None) -> Callable[..., Value]:
    def run(reader: Reader, x: Any, negative_slope: Any = slope, inplace: Any = False) -> Value:
        value = reader.value(x)
        raise_unless(type(inplace) is bool and type(negative_slope) in (int, float, type(None)), "an activation")
        if inplace:  # of what nobody else has
            held = any(each is x for frame in reader.frames for each in leaves(frame.values()))
            raise_unless(x.fresh and not held and not any(each is x for each in reader.seen), "it works in place")
        options = () if negative_slope is None else (number(negative_slope),)
        return reader.made(node(name, value.node, *options), value.dims)

    if slope is None:
        return lambda reader, x, inplace=False: run(reader, x, None, inplace)
    return run


def _clamp(reader: Reader, x: Any, min: Any = None, max: Any = None) -> Value:
    value = reader.value(x)
    raise_unless(type(min) in (int, float) and type(max) in (int, float), "a clamp")
    return reader.made(node("clamp", value.node, number(min), number(max)), value.dims)


def _pad(reader: Reader, x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Value:
    raise_unless(isinstance(pad, (tuple, list)) and all(type(n) is int for n in pad), "a padding")
    raise_unless(mode == "constant" and value in (None, 0) and len(pad) % 2 == 0, "a padding that is not of zeros")
    result, rank = reader.value(x), len(reader.value(x).dims)
    raise_unless(len(pad) <= 2 * rank, "a padding")
    for dim in range(rank - len(pad) // 2, rank):
        before, after = pad[2 * (rank - 1 - dim)], pad[2 * (rank - 1 - dim) + 1]
        size = result.shape[dim]
        if min(before, after) < 0:
            result = reader.part(result, dim, max(-before, 0), size - max(-after, 0), 1)
            before, after, size = max(before, 0), max(after, 0), result.shape[dim]
        if before == after == 0:
            continue
        dims = list(result.dims)
        # Of a dimension of size 1, which has no axis: the one before it names it.
        axes = dims[dim] or (("after", dim and dims[dim - 1]) if dim and dims[dim - 1] else None)
        raise_unless(axes is not None and all(t != "" for t, *_ in dims[dim]), "a padding of copies")
        dims[dim] = ((f"padded {axes} by {before}, {after}", 1, before + size + after),)
        result = reader.made(node("padded", result.node, axes, before, after), dims)
    return replace(result, fresh=True)


def _flip(reader: Reader, x: Any, *dims: Any) -> Value:
    result = reader.value(x)
    for dim in sorted(_dims(result, _flat_sizes(dims))):
        axes = result.dims[dim]
        if axes:
            raise_unless(all(tensor for tensor, _, _ in axes), "a flip of copies")
            turned = list(result.dims)
            turned[dim] = ((f"flipped {axes}", 1, result.shape[dim]),)
            result = reader.made(node("flipped", result.node, axes), turned)
    return replace(result, fresh=True)


def _filter(
    reader: Reader,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> Value:
    """conv2d of each channel by itself with the same kernel."""
    image, kernel = reader.value(x), reader.value(weight)
    ones = (1, (1, 1))
    plain = bias is None and fixed(stride) in ones and fixed(padding) in (0, (0, 0)) and fixed(dilation) in ones
    raise_unless(plain and len(image.dims) == len(kernel.dims) == 4, "a convolution")
    one = kernel.shape[1] == 1 and kernel.shape[0] == groups == image.shape[1]
    raise_unless(one and all(tensor == "" for tensor, _, _ in kernel.dims[0]), "a convolution of several channels")
    dims, spans = list(image.dims), []
    for dim in (2, 3):
        axes, taps = image.dims[dim], kernel.dims[dim]
        left = image.shape[dim] - kernel.shape[dim] + 1
        raise_unless(left > 0 and all(tensor for tensor, _, _ in (*axes, *taps)), "a convolution")
        spans.append((axes, taps))
        if taps:
            dims[dim] = ((f"filtered {axes} by {kernel.shape[dim]}", 1, left),)
    return reader.made(node("filtered", image.node, kernel.node, tuple(spans)), dims)


def _itself(reader: Reader, x: Any) -> Value:
    return reader.view(x, reader.value(x).dims)


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: _elementwise(name, 1) for name in ("neg", "abs", "exp", "sqrt", "rsqrt", "square")},
    **{name: _elementwise(name, 2) for name in ("add", "sub", "mul", "div", "pow")},
    **{name: _reduction(name) for name in ("mean", "sum")},
    "var": _variance("var"), "std": _variance("std"), "norm": _norm, "normalize": _normalize,
    "matmul": _matmul, "mm": _matmul, "mv": _matmul, "dot": _matmul,
    "expand": _expand, "repeat": _repeat, "permute": _permute, "transpose": _transpose, "t": _t, "squeeze": _squeeze,
    "unsqueeze": _unsqueeze, "view": _view, "reshape": _reshape, "flatten": _flatten, "unflatten": _unflatten,
    "expand_as": _expand_as, "view_as": _view_as, "size": _size, "cat": _cat, "contiguous": _itself, "clone": _itself,
    "relu": _activation("relu", None), "leaky_relu": _activation("leaky_relu", 0.01), "clamp": _clamp,
    "pad": _pad, "flip": _flip, "conv2d": _filter,
    "detach": lambda reader, x: reader.detached(reader.value(x) if x.cell is None else x),
    "dim": lambda reader, x: len(reader.value(x).dims), "numel": lambda reader, x: math.prod(reader.value(x).shape),
}  # fmt: skip

FUNCTIONS: dict[Any, str] = {
    **{getattr(torch, n): n for n in OPERATIONS if hasattr(torch, n)},
    **{getattr(torch, alias): n for alias, n in (
        ("concat", "cat"), ("concatenate", "cat"), ("absolute", "abs"), ("negative", "neg"), ("subtract", "sub"),
        ("multiply", "mul"), ("divide", "div"), ("true_divide", "div"), ("swapaxes", "transpose"),
    )},
    F.normalize: "normalize", F.relu: "relu", F.leaky_relu: "leaky_relu", F.pad: "pad", F.conv2d: "conv2d",
}  # fmt: skip

signature = functools.lru_cache(maxsize=256)(inspect.signature)
