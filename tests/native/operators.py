"""Calls of every compiled operator, and each of their tensor arguments in every other form: dtypes, strides, sizes.

A module for test_operators.py and, since the same must hold under AddressSanitizer in a process of its own, a program:
``python operators.py [operator ...]`` prints what is wrong, and ends with the number of calls.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
import gankern.functional as GF
from gankern.ops.self_attention2d import attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# (primitive, what to call with inputs, the inputs' sizes): small, but with whole vectors and their tails.
EXAMPLES: list[tuple[Callable[..., Any], list[tuple[int, ...]]]] = [
    (lambda x, b: GF.bias_act(x, b, activation="leaky_relu", clamp=2.0), [(4, 19, 5, 7), (19,)]),
    (lambda x, b: GF.bias_act(x, b, activation="silu"), [(4, 19, 5, 7), (19,)]),
    (
        lambda x, b: torch.ops.gankern.bias_act_forward_(x.detach().clone(), b.detach(), 1, 1, 0.2, 1.0, None),
        [(4, 19, 5, 7), (19,)],
    ),
    (lambda x, b, s: GF.bias_act(x, b, activation="prelu", slope=s), [(4, 19, 5, 7), (19,), (19,)]),
    (lambda q, kv: attention(q, kv, None), [(2, 4, 12), (2, 10, 6)]),
    (lambda x: GF.pixel_norm(x), [(3, 18, 5, 7)]),
    (lambda x, b: GF.bias_act_pixel_norm(x, b, activation="leaky_relu"), [(3, 18, 5, 7), (18,)]),
    (lambda x: GF.minibatch_stddev(x, group_size=3, num_channels=2), [(6, 10, 5, 7)]),
    (lambda x: GF.l1_similarity(x), [(7, 3, 5)]),
    (lambda x, y: GF.l1_similarity(x, y), [(7, 3, 5), (6, 3, 5)]),
    (lambda g: GF.gradient_penalty(g), [(5, 3, 7, 5)]),
    (
        lambda x, w, b: GF.batch_norm_act(x, None, None, w, b, training=True, activation="leaky_relu"),
        [(5, 9, 4, 7), (9,), (9,)],
    ),
    (
        lambda x, w, b, m: GF.batch_norm_act(x, m.detach().float(), m.detach().square().float() + 1, w, b),
        [(5, 9, 4, 7), (5, 9), (5, 9), (9,)],
    ),
    (
        lambda x, w, b: GF.instance_norm_act(x, None, None, w, b, activation="leaky_relu"),
        [(5, 9, 4, 7), (9,), (9,)],
    ),
    (lambda x, w, b: GF.instance_norm_act(x, None, None, w, b), [(5, 9, 4, 70), (5, 9), (5, 9)]),
    (lambda x, w, b: GF.group_norm_act(x, 3, w, b, activation="leaky_relu"), [(5, 9, 4, 70), (9,), (9,)]),
    (
        lambda x, m, w, b: GF.virtual_batch_norm(x, m, m.square() + 1, 3, w, b, activation="leaky_relu"),
        [(5, 9, 4, 7), (9,), (9,), (9,)],
    ),
    (lambda x: sum(GF.virtual_batch_norm_statistics(x)), [(5, 9, 4, 7)]),
    (lambda x, f: GF.upfirdn2d(x, f.detach(), up=2, padding=2), [(2, 5, 7, 6), (4,)]),
    (lambda x, f: GF.upfirdn2d(x, f.detach(), down=2, padding=2), [(2, 5, 7, 6), (3, 4)]),
    (lambda x, w, b: GF.upsample_conv2d(x, w, b), [(2, 5, 6, 7), (6, 5, 3, 3), (6,)]),
    (lambda x, w, b: GF.conv2d_downsample(x, w, b), [(2, 5, 6, 8), (6, 5, 3, 3), (6,)]),
    (
        lambda w, y, u, v, s, t: GF.spectral_norm_group([w, y], [u.detach(), s.detach()], [v.detach(), t.detach()]),
        [(6, 3, 4, 4), (5, 18), (6,), (48,), (5,), (18,)],
    ),
]

# Arguments that belong to another one's order of memory, and are right beside that alone.
TOGETHER = {("pixel_norm_backward", "y"), ("pixel_norm_double_backward", "y")}


class Recorder(TorchDispatchMode):
    """Keeps every call of an operator of this library, with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gankern":
            names = [a.name for a in func._schema.arguments]
            self.calls.append((func, [copied(a) for a in [*args, *(kwargs or {}).values()]]))
            assert len(self.calls[-1][1]) <= len(names)
        return func(*args, **(kwargs or {}))


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def recorded(dtype: torch.dtype) -> Iterator[tuple[Any, list[Any]]]:
    """(operator, arguments) of forward, backward and double backward of all examples."""
    generator = torch.Generator().manual_seed(0)
    for call, sizes in EXAMPLES:
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
        with Recorder() as recorder, gankern.use_implementation("cpu"):
            result = call(*inputs)
            outputs = [result] if isinstance(result, Tensor) else list(result or ())
            ones = [torch.rand_like(y).requires_grad_() for y in outputs]
            grads = torch.autograd.grad(outputs, inputs, ones, create_graph=True, allow_unused=True) if outputs else []
            grads = [g for g in grads if g is not None and g.requires_grad]
            if grads:
                torch.autograd.grad(grads, [*inputs, *ones], [torch.rand_like(g) for g in grads], allow_unused=True)
        yield from recorder.calls


def gaps(t: Tensor) -> Tensor:
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1) if t.ndim else (3,), float("nan"))
    view = wide[..., 1::2] if t.ndim else wide[1]
    return view.copy_(t)


def permuted(t: Tensor, order: list[int]) -> Tensor:
    back = [order.index(d) for d in range(t.ndim)]
    return t.permute(order).contiguous().permute(back)


def expanded(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, 1).expand(t.shape)


def offset(t: Tensor) -> Tensor:
    """A view that begins one element into its memory: no longer aligned."""
    return torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape)


def forms(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other strides; where not the same values, then as the name's canonical copy has them."""
    yield "offset", offset(t)
    yield "gaps", gaps(t)
    yield "negative", torch._neg_view(-t)
    for dim in range(t.ndim):
        yield f"expanded {dim}", expanded(t, dim)
    if t.ndim > 1:
        yield "reversed", permuted(t, list(range(t.ndim))[::-1])
        yield "last in front", permuted(t, [t.ndim - 1, *range(t.ndim - 1)])
        yield "channels last", permuted(t, [0, *range(2, t.ndim), 1])
        yield "rows cut", torch.cat([t, t], 1)[:, : t.shape[1]]


def sizes_beside(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dim in range(t.ndim):
        yield f"empty along {dim}", t.narrow(dim, 0, 0)
        yield f"one less along {dim}", t.narrow(dim, 0, t.shape[dim] - 1)
        yield f"one more along {dim}", torch.cat([t, t.narrow(dim, 0, 1)], dim)
    yield "a dimension less", t.flatten(0, 1) if t.ndim > 1 else t.sum()
    yield "a dimension more", t.unsqueeze(0)


def tensors_of(args: list[Any]) -> Iterator[tuple[tuple[int, int | None], Tensor]]:
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            yield (i, None), value
        elif isinstance(value, list):
            yield from (((i, j), v) for j, v in enumerate(value) if isinstance(v, Tensor))


def replaced(args: list[Any], place: tuple[int, int | None], value: Tensor) -> list[Any]:
    args = [list(a) if isinstance(a, list) else a for a in args]
    i, j = place
    if j is None:
        args[i] = value
    else:
        args[i][j] = value
    return args


def run(operator: Any, args: list[Any]) -> list[Tensor]:
    """Results, and what was written to."""
    written = [
        a for a, s in zip(args, operator._schema.arguments) if s.alias_info is not None and s.alias_info.is_write
    ]
    result = operator(*args)
    flat = [result] if isinstance(result, Tensor) else list(result or ())
    if operator is torch.ops.gankern.pixel_norm.default:
        flat[1] = flat[1].sort().values  # one value a pixel, in the order of x's memory
    return [y for x in [*flat, *written] for y in (x if isinstance(x, (list, tuple)) else [x])]


def close(ours: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> bool:
    """Up to another order of summation."""
    eps = torch.finfo(dtype).eps
    if len(ours) != len(right) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(ours, right)):
        return False
    for a, b in zip(ours, right):
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        difference = (a - b)[b.isfinite()].abs()
        if difference.numel() and difference.max().item() > 256 * eps * max(largest, 1e-6):
            return False
    return True


def check(only: list[str], dtypes: tuple[torch.dtype, ...] = DTYPES) -> tuple[Counter[str], list[str]]:
    """(calls of each operator, what is wrong)."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for dtype in dtypes:
        for operator, args in recorded(dtype):
            name = operator._schema.name.partition("::")[2]
            if only and name not in only:
                continue
            for place, t in tensors_of(args):
                argument = operator._schema.arguments[place[0]]
                writes = argument.alias_info is not None and argument.alias_info.is_write
                where = f"{name}({argument.name}{'' if place[1] is None else place[1]} {t.dtype}, of {dtype}"
                for form, value in forms(t):
                    if writes and (form == "negative" or form.startswith("expanded")):
                        continue  # refused by torch
                    counts[name] += 1
                    # First what it should be: an operator may write to its argument.
                    right = run(
                        operator,
                        replaced(args, place, value.resolve_neg().clone(memory_format=torch.contiguous_format)),
                    )
                    try:
                        ours = run(operator, replaced(args, place, value))
                    except RuntimeError as error:
                        if (name, argument.name) not in TOGETHER or "must be what the forward returned" not in str(
                            error
                        ):
                            wrong.append(f"{where}) as {form}: {error}")
                        continue
                    if (name, argument.name) not in TOGETHER and not close(ours, right, dtype):
                        wrong.append(f"{where}) as {form}: wrong numbers")
                for other in DTYPES:
                    if other == t.dtype:
                        continue
                    counts[name] += 1
                    for value in (t.to(other), gaps(t.to(other))):
                        try:
                            ours = run(operator, replaced(args, place, value))
                        except RuntimeError:
                            continue  # refused
                        right = run(operator, replaced(args, place, value.to(t.dtype).contiguous()))
                        converted = [y.to(x.dtype) for x, y in zip(ours, right)]
                        coarse = max((dtype, other), key=lambda d: torch.finfo(d).eps)
                        if not close(ours, converted, coarse):
                            wrong.append(f"{where}) as {other}: wrong numbers")
                for _, value in sizes_beside(t):
                    counts[name] += 1
                    # Refused, or done; but it must not leave its memory: AddressSanitizer looks on.
                    with contextlib.suppress(RuntimeError, IndexError):
                        run(operator, replaced(args, place, value))
    return counts, wrong


def main() -> None:
    counts, wrong = check(sys.argv[1:])
    print("\n".join([*map(str, torch.ops.loaded_libraries), *wrong]))
    print(f"{sum(counts.values())} calls of {len(counts)} operators, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
