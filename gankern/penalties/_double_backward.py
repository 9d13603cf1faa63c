"""The gradient of a gradient penalty by double backward, for any critic.

Passes over the critic: forward, data gradient (no weight gradient), and the backward of that, which
:class:`gankern.fast_double_backward` keeps at the cost of a tangent forward and a weight gradient: four in all where
the critic is piecewise linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gankern.core.double_backward import fast_double_backward
from gankern.core.torch_internals import autocasting, graph_of, sequence_number
from gankern.tangent.convolutions import fast_convolutions
from gankern.tangent.method import resolve


def penalty_gradients(
    critic: Callable[..., Any],
    inputs: Sequence[Tensor],
    penalty: Callable[[list[Tensor]], tuple[Tensor, Sequence[Tensor]]],
    select: Callable[[Any], Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The penalty of the critic's gradients at ``inputs``, what it has gradients for, and these: the parameters, and
    those of the inputs and other arguments that require one. See ``_common`` for the arguments."""
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
        # The passes run in the types that the forward ran in.
        device = out.device.type
        with torch.autocast(device, enabled=False) if autocasting(device) else contextlib.nullcontext():
            gradients: Sequence[Tensor | None] = [None]
            if out.requires_grad:
                gradients = torch.autograd.grad(out, xs, torch.ones_like(out), create_graph=True, allow_unused=True)
            if all(g is None for g in gradients):
                raise ValueError(
                    "gradient penalty: the critic's output does not depend on its input (was it detached?)"
                )
            del out
            leaves, errors, first = graph_of([g for g in gradients if g is not None])
            for node in errors:
                # Of what has no second derivative: raises, as a backward would. torch.autograd.grad, which goes to the
                # leaves alone, passes it by, and would leave out what flows through it.
                node(*[torch.zeros(())] * len(node._input_metadata))
            # What the critic has from its caller's graph, such as weights that another network computes, must stay.
            of_others = first < begin
            given = {id(leaf) for leaf in (*originals, *xs)}
            parameters = [leaf for leaf in leaves if id(leaf) not in given]
            with torch.no_grad():
                value, directions = penalty(
                    [torch.zeros_like(x) if g is None else g.detach() for g, x in zip(gradients, xs)]
                )
            pairs = [(g, v) for g, v in zip(gradients, directions) if g is not None and g.requires_grad]
            leaves = [*parameters, *originals]
            del gradients, directions
            found = _second(pairs, leaves, of_others)
    targets = [(originals.get(leaf, leaf), g) for leaf, g in zip(leaves, found) if g is not None]
    return value, [target for target, _ in targets], [g for _, g in targets]


def _second(pairs: list[tuple[Tensor, Tensor]], leaves: list[Tensor], of_others: bool) -> Sequence[Tensor | None]:
    if not pairs or not leaves:
        return [None] * len(leaves)
    outputs, directions = zip(*pairs)
    pairs.clear()
    # Hooks of parameters run when the gradients are handed out, and only then.
    hooks = [(leaf, leaf._backward_hooks) for leaf in leaves if leaf._backward_hooks]
    try:
        for leaf, _ in hooks:
            leaf._backward_hooks = None
        return torch.autograd.grad(outputs, leaves, directions, retain_graph=of_others, allow_unused=True)
    finally:
        for leaf, of_leaf in hooks:
            leaf._backward_hooks = of_leaf
