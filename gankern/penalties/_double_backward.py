"""The gradient of a gradient penalty by double backward, for any critic.

Passes over the critic: forward, data gradient (no weight gradient), and the backward of that, which
:class:`gankern.fast_double_backward` keeps at the cost of a tangent forward and a weight gradient: four in all where
the critic is piecewise linear.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from gankern.core.double_backward import fast_double_backward
from gankern.core.torch_internals import (
    autocasting,
    graph_of,
    in_forward_mode,
    keep_in_thread,
    kept_in_thread,
    recorded_backwards,
    sequence_number,
    with_zeros,
)
from gankern.tangent.convolutions import fast_convolutions
from gankern.tangent.method import resolve


def penalty_gradients(
    name: str,
    critic: Callable[..., Any],
    inputs: Sequence[Tensor],
    penalty: Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]],
    select: Callable[[Any], Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The penalty of the critic's gradients at ``inputs``, what it has gradients for (the parameters, and those of the
    inputs and other arguments that require one), behind these the leaves that the outputs alone depend on; and the
    gradients. ``name`` is the function's that was called, for its errors; see ``_common`` for the other arguments.

    Where the critic has weights from its caller's graph, which another network computes, the gradients at ``inputs``
    take the parameters' place: the caller's backward goes on from these, so that it comes by his weights, whoever asks
    for their gradient or has hooks of them, and through his graph once.
    """
    penalty, select = resolve(penalty), resolve(select)
    xs = [x.detach().requires_grad_() for x in inputs]
    # Other arguments that require a gradient: the graph in front of them is the caller's and must stay.
    originals: dict[Tensor, Tensor] = {x: original for x, original in zip(xs, inputs) if original.requires_grad}

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad or value.is_leaf:
            return value
        leaf = value.detach().requires_grad_()
        originals[leaf] = value
        return leaf

    args, kwargs = tuple(args), dict(kwargs or {})
    if args or kwargs:
        args, kwargs = tree_map(cut, (args, kwargs))
    begin = sequence_number()
    with fast_double_backward():
        with fast_convolutions(critic, xs[0]):
            out = select(critic(*xs, *args, **kwargs))
        if in_forward_mode():
            _refuse_tangents(name, (*inputs, out))
        # Of the forward alone: what a device's thread of the engine records has that thread's numbers.
        forward = graph_of([out])
        of_others = forward.first < begin
        # The passes run in the types that the forward ran in.
        device = out.device.type
        with torch.autocast(device, enabled=False) if autocasting(device) else contextlib.nullcontext():
            gradients: Sequence[Tensor | None] = [None]
            since = recorded_backwards()
            if out.requires_grad:
                gradients = torch.autograd.grad(out, xs, torch.ones_like(out), create_graph=True, allow_unused=True)
            if all(g is None for g in gradients):
                raise ValueError(f"{name}: the output does not depend on its input (was it detached?)")
            del out
            graph = graph_of([g for g in gradients if g is not None], None if of_others else since)
            for node in graph.errors:
                # Of what has no second derivative: raises, as a backward would. torch.autograd.grad, which goes to the
                # leaves alone, passes it by, and would leave out what flows through it.
                node(*[torch.zeros(())] * len(node._input_metadata))
            given = {id(leaf) for leaf in (*originals, *xs)}
            parameters = [leaf for leaf in graph.leaves if id(leaf) not in given]
            with torch.no_grad():
                value, directions = penalty(
                    [torch.zeros_like(x) if g is None else g.detach() for g, x in zip(gradients, xs)]
                )
            pairs = [(g, v) for g, v in zip(gradients, directions) if g is not None and g.requires_grad]
            going_on = list(pairs) if of_others else []
            leaves = list(originals) if of_others else [*parameters, *originals]
            del gradients, directions
            # A weight that parametrize.cached() keeps has a graph that its next use goes through, too.
            found = with_zeros(graph, leaves, _second(pairs, leaves, of_others or bool(parametrize._cache_enabled)))
    targets = [(originals.get(leaf, leaf), g) for leaf, g in zip(leaves, found) if g is not None] + going_on
    given.update(id(target) for target, _ in targets)
    others = [leaf for leaf in forward.leaves if id(leaf) not in given]
    return value, [*(target for target, _ in targets), *others], [g for _, g in targets]


def _refuse_tangents(name: str, tensors: Sequence[Tensor]) -> None:
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{name}: a penalty has no derivative in forward mode, since its gradients are computed where it is "
            f"called, and a sample or what the network returned has a tangent; write it with torch.autograd.grad(..., "
            f"create_graph=True) for that"
        )


def _second(pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor], stays: bool) -> Sequence[Tensor | None]:
    """``stays``: whether the graph is gone through again."""
    if not pairs or not leaves:
        return [None] * len(leaves)
    outputs, directions = zip(*pairs)
    pairs.clear()
    with _without_hooks(leaves):
        return torch.autograd.grad(outputs, leaves, directions, retain_graph=stays, allow_unused=True)


# In torch's state of a thread, which the engine's threads have too: whether hooks of parameters are skipped.
_SKIPS = "gankern.penalties"
_lock = threading.Lock()


class _Skipped:
    """Stands for a hook of a parameter while a penalty is computed. It is skipped in that backward alone: other threads
    may run others meanwhile."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        self.hook, self.penalties = hook, 0

    def __call__(self, grad: Tensor) -> Any:
        return None if _skips() else self.hook(grad)


def _skips() -> bool:
    return bool(kept_in_thread(_SKIPS))


@contextlib.contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of parameters run when the gradients are handed out, and only then. torch's list of them stays as it is,
    which the backward of another thread may be reading."""
    of_leaves: list[Any] = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    if not of_leaves:
        yield
        return
    put = []
    with _lock:
        for hooks in of_leaves:
            for number, hook in list(hooks.items()):
                skipped = hook if isinstance(hook, _Skipped) else _Skipped(hook)
                skipped.penalties += 1
                hooks[number] = skipped
                put.append((hooks, number, skipped))
    before = _skips()
    keep_in_thread(_SKIPS, True)
    try:
        yield
    finally:
        keep_in_thread(_SKIPS, before)
        with _lock:
            for hooks, number, skipped in put:
                skipped.penalties -= 1
                if not skipped.penalties and hooks.get(number) is skipped:
                    hooks[number] = skipped.hook
