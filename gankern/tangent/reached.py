"""Which parameters have a gradient of zeros in plain PyTorch, and not none.

The tangent form finds a gradient for each parameter that the penalty depends on. To the others torch's double backward
gives either none, such as to the bias of the last layer, or zeros, such as to a bias below a LeakyReLU: the derivative
of leaky_relu's backward by its input is a tensor of zeros, which goes all the way back through the network. Optimisers
tell these two apart.

So for each operator between inputs and output it is asked which of its inputs its backward has a derivative for, zeros
or not; whatever is before these has a gradient. torch itself is asked, once for each kind of call, with other tensors
of these sizes.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gankern.core.torch_internals import recomputed

aten = torch.ops.aten
logger = logging.getLogger("gankern")


class Answer(NamedTuple):
    """For one result of an operator, by the places of its tensors: where the gradient goes to, and which of them the
    gradient has a derivative for."""

    flows: tuple[int, ...]
    depends: tuple[int, ...]


class Step(NamedTuple):
    """One operator that a tape has recorded: the values that it takes and makes, None for what is constant."""

    ins: Sequence[int | None]
    outs: Sequence[int | None]
    answers: Callable[[], Sequence[Answer]]  # one for each of outs


def parameters(steps: Sequence[Step], end: int) -> set[int | None]:
    """The values that have a gradient of second order, of zeros or not, where ``end`` is the critic's output."""
    live: set[int | None] = {end}
    reached: set[int | None] = set()
    for step in reversed(steps):
        for out, answer in zip(step.outs, step.answers()):
            if out in live:
                live.update(step.ins[i] for i in answer.flows)
                reached.update(step.ins[i] for i in answer.depends)
        reached.discard(None)
    for step in reversed(steps):
        if any(out in reached for out in step.outs):
            reached.update(i for i in step.ins if i is not None)
    return reached


def known(ins: Sequence[int | None], outs: Sequence[int | None], inputs: Iterable[int], pieces: bool) -> Step:
    """The step of an operator of this library: a gradient goes to the places ``inputs``; ``pieces`` is whether torch's
    operators in its place have derivatives of zeros."""
    answer = Answer(tuple(inputs), tuple(range(len(ins))) if pieces else ())
    return Step(ins, outs, lambda: [answer] * len(outs))


def asked(func: Any, args: tuple, kwargs: dict[str, Any], kinds: Sequence[int], ins: Sequence[int | None]) -> Any:
    """For an operator of torch that is called so: a function of what it made, to call afterwards, that gives the step.

    ``kinds`` and ``ins`` are of the tensors in the order of flat(args, kwargs)."""
    bilinear = _BILINEAR.get(func)
    if bilinear is not None:
        return lambda outs: Step(ins, outs, lambda: [_product(kinds, *bilinear)])
    key = func, tuple(kinds), *map(_kind_of, flat(args, kwargs))
    answers = _answers.get(key)
    call = None if answers is not None else _without_data(args, kwargs)

    def step(outs: Sequence[int | None]) -> Step:
        return Step(ins, outs, lambda: answers or _ask(key, call, func, kinds, len(outs)))

    return step


# By operator, the places of the two tensors that it is linear in each of. Asked, it would be computed.
_BILINEAR = {
    aten.convolution.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mul.Tensor: (0, 1),
}


def _product(kinds: Sequence[int], a: int, b: int) -> Answer:
    """The gradient by one factor is linear in the other."""
    flows = tuple(i for i, kind in enumerate(kinds) if kind & 1)
    depends = tuple(other for i, other in ((a, b), (b, a)) if i in flows and other < len(kinds) and kinds[other])
    return Answer(flows, depends)


def flat(args: Any, kwargs: dict[str, Any] | None = None) -> list[Any]:
    """The arguments, or results, of an operator, with those in lists one by one."""
    found: list[Any] = []
    for x in args if isinstance(args, (list, tuple)) else (args,):
        if isinstance(x, (list, tuple)):
            found += x
        else:
            found.append(x)
    return found + flat(list(kwargs.values())) if kwargs else found


_answers: dict[tuple, Sequence[Answer]] = {}
_SMALL = 2**20
_MANY = 8192  # sizes of batches are in the keys


def _kind_of(x: Any) -> Any:
    """What of an argument can make a difference: not the sizes of tensors, and of numbers those that have formulas of
    their own."""
    if isinstance(x, Tensor):
        return x.dtype, x.dim()
    if isinstance(x, float):
        return x if x in (0.0, 1.0, 2.0) else float
    return x if x is None or isinstance(x, (bool, int, str)) else str(x)


class _Shape(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, kind: int) -> Tensor:
        # Small ones have data all the same: what computes without comes from Dynamo, which takes seconds to import.
        small = math.prod(self.size) <= _SMALL and not torch.compiler.is_compiling()
        x = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="cpu" if small else "meta")
        return x.fill_(0.5 if x.is_floating_point() else 0).requires_grad_(bool(kind))


def _number(x: Any) -> Any:
    return x.node.hint if isinstance(x, torch.SymInt) else x


def _without_data(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def bare(x: Any) -> Any:
        if isinstance(x, Tensor):
            return _Shape(tuple(map(_number, x.shape)), tuple(map(_number, x.stride())), x.dtype)
        if isinstance(x, (list, tuple)):
            return [bare(y) for y in x]
        return None if isinstance(x, torch.device) else _number(x)

    return tuple(map(bare, args)), {name: bare(x) for name, x in kwargs.items()}


def _ask(key: tuple, call: Any, func: Any, kinds: Sequence[int], results: int) -> Sequence[Answer]:
    answers = _answers.get(key)
    if answers is None:
        if len(_answers) >= _MANY:
            _answers.clear()
        try:
            with torch._C._DisableTorchDispatch(), torch.enable_grad(), _without_random_numbers(), _unseen():
                answers = [_differentiate(call, func, kinds, i) for i in range(results)]
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            # An operator that cannot run without data: what it takes counts as reached, as it is wherever there is any
            # curvature at all.
            logger.debug("%s cannot be asked which second derivatives it has: %s", func, error)
            every = tuple(range(len(kinds)))
            answers = [Answer(tuple(i for i in every if kinds[i] & 1), every)] * results
        _answers[key] = answers
    return answers


@contextlib.contextmanager
def _without_random_numbers() -> Iterator[None]:
    """Within it, an operator that draws random numbers takes none away from the caller's."""
    if torch.compiler.is_compiling():  # on the meta device, which draws none
        yield
        return
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Within it, who keeps what autograd saves, as activation checkpointing does, is not given it."""
    if torch.compiler.is_compiling() or not recomputed():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _differentiate(call: Any, func: Any, kinds: Sequence[int], result: int) -> Answer:
    leaves: list[Tensor] = []

    def filled(x: Any) -> Any:
        if isinstance(x, _Shape):
            leaf = x.tensor(kinds[len(leaves)])
            leaves.append(leaf)
            return leaf.clone() if leaf.requires_grad else leaf  # which may be written to
        return [filled(y) for y in x] if type(x) is list else x

    args, kwargs = call
    args = [filled(x) for x in args]
    y = func(*args, **{name: filled(x) for name, x in kwargs.items()})
    y = [x for x in flat(y) if isinstance(x, Tensor)][result]
    wanted = [i for i, kind in enumerate(kinds) if kind & 1]
    if not y.requires_grad or not wanted:
        return Answer((), ())
    # Weighted sums, not grad_outputs: for those torch imports what is heavy.
    y = _real(y)
    weighted = (y * torch.ones_like(y, requires_grad=True)).sum()
    found = torch.autograd.grad(weighted, [leaves[i] for i in wanted], create_graph=True, allow_unused=True)
    flows = tuple(i for i, g in zip(wanted, found) if g is not None)
    gradients = [g for g in found if g is not None and g.requires_grad]
    if not gradients:
        return Answer(flows, ())
    of = [i for i, kind in enumerate(kinds) if kind]
    total = reduce(torch.add, (_real(g).sum() for g in gradients))
    second = torch.autograd.grad(total, [leaves[i] for i in of], allow_unused=True)
    return Answer(flows, tuple(i for i, g in zip(of, second) if g is not None))


def _real(x: Tensor) -> Tensor:
    """A complex tensor as its parts: a sum to differentiate is real."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
