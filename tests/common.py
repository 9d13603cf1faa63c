"""What tests of several folders use; tests/conftest.py makes it importable."""

import threading

import pytest
import torch
from torch.autograd import grad

from gankern.core import native

needs_nodes = pytest.mark.skipif(native.NODES_MISSING is not None, reason=str(native.NODES_MISSING))


def every_order(function, tensors):
    """The result, the gradients of the tensors (None among them are handed on), and the gradients of these by the
    gradient that came in and the tensors; zeros for those that do not exist."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    present = [t for t in leaves if t is not None]
    y = function(*leaves)
    g = _numbers(y, 0).requires_grad_()
    first = grad(y, present, g, create_graph=True)
    directions = [_numbers(t, 1 + i) for i, t in enumerate(first)]
    second = grad(first, [g, *present], directions, allow_unused=True)
    return [y, *first, *(torch.zeros_like(t) if s is None else s for s, t in zip(second, [g, *present]))]


def small_cases(tier):
    """The verified cases of the primitives that have a tier, but for those too large for an emulator."""
    from gankern.core.dispatch import Primitive
    from gankern.measure.cases import all_cases

    return [
        case
        for case in all_cases()
        if case.verify
        and any(i.name == tier for i in Primitive.registry[case.primitive].implementations)
        and max(x.numel() for x in case.make(torch.float32, "cpu")) < 30_000
    ]


def _numbers(like, seed):
    """Numbers that every dtype has."""
    generator = torch.Generator().manual_seed(100 + seed)
    return (torch.randn(like.shape, generator=generator) + 0.3).to(torch.bfloat16).to(like)


def compiles_to_one_graph(step, *tensors):
    """Its result and its gradients are those of eager mode."""
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), step(*tensors))
    torch.testing.assert_close(grad(compiled(*tensors), tensors), grad(step(*tensors), tensors))


def iterated(m, u, v, rules, normalize, n):
    """u and v after n power iterations of spectral norm on a matrix, in the order of a dialect."""
    for _ in range(n):
        if rules.u_first:
            u = normalize(m @ v)
            v = normalize(m.T @ u)
        else:
            v = normalize(m.T @ u)
            u = normalize(m @ v)
    return u, v


def with_gradient(name, change):
    """A Function of that name: values as they are, and ``change`` of their gradient."""
    methods = {"forward": lambda ctx, x: x.view_as(x), "backward": lambda ctx, grad: change(grad)}
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})


def in_threads(*functions):
    """Runs the functions side by side; raises what one of them raised."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


class Applied(torch.nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Twice(torch.autograd.Function):
    """Somebody's own, which nobody knows."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad
