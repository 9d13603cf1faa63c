"""Triton's launchers are called without torch's dispatcher, but where it has something to do."""

import pytest
import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.core import registry
from gankern.ops import bias_act  # noqa: F401  (defines the operators)

CUDA = torch.device("cuda")
OPTIONS = (1, 2, 0.2, 1.0, None)  # dim, activation, slope, gain, clamp


class Own(torch.Tensor):
    """A subclass that does nothing but to be one."""


@pytest.fixture
def ways(monkeypatch):
    """What was called for "cuda": the launcher, which puts itself on record here, or the operator, on CPU tensors."""
    seen = []

    def launcher(x, bias, *options):
        seen.append("launcher")
        return torch.ops.gankern.bias_act(x, bias, *options)

    monkeypatch.setattr(registry, "_launcher", lambda primitive, name: launcher)
    registry._launch.cache_clear()
    yield seen
    registry._launch.cache_clear()


def call(x):
    return registry.kernel("triton", "bias_act", "forward", CUDA)(x, None, *OPTIONS)


def imaginary(values):
    """The values as a view that is negated when it is read."""
    return torch.complex(torch.zeros_like(values), -values).conj().imag


@pytest.mark.skipif(registry.NATIVE_MISSING is not None, reason="the operator runs on CPU tensors here")
def test_plain_tensors_go_to_the_launcher_and_all_else_through_the_operator(ways):
    x = torch.tensor([[-1.0, 2.0]])
    right = torch.tensor([[-0.2, 2.0]])
    for plain in (x, torch.nn.Parameter(x)):
        with torch.no_grad():
            torch.testing.assert_close(call(plain), right)
    assert ways == ["launcher"] * 2

    ways.clear()
    negated = imaginary(x)
    assert negated.is_neg() and torch.equal(negated, x)
    torch.testing.assert_close(call(negated), right)
    torch.testing.assert_close(call(x.as_subclass(Own)).as_subclass(torch.Tensor), right)
    assert torch.equal(call(torch._efficientzerotensor((1, 2))), torch.zeros(1, 2))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(func)
            return func(*args, **(kwargs or {}))

    operators = []
    with Mode():
        torch.testing.assert_close(call(x), right)
    assert torch.ops.gankern.bias_act.default in operators
    with profile() as events:
        call(x)
    assert any(event.name == "gankern::bias_act" for event in events.function_events)
    assert ways == []


def test_lists_of_tensors_are_looked_into():
    x = torch.ones(2)
    assert registry._plain(([x, None, x], 1, 2.0, None, "text"))
    assert not registry._plain(([x, x.as_subclass(Own)], 1))
    assert not registry._plain(([x, imaginary(x)],))


def test_a_call_by_another_tier_is_the_operator():
    operator = registry.kernel("cpu", "bias_act", "backward", torch.device("cpu"))
    assert operator is torch.ops.gankern.bias_act_backward.default
    operator = registry.kernel("cuda", "upfirdn2d", "forward", CUDA)
    assert operator is torch.ops.gankern_cuda.upfirdn2d.default
    same = str(operator._schema).replace("gankern_cuda::", "gankern::")
    assert same == str(torch.ops.gankern.upfirdn2d.default._schema)


@pytest.mark.skipif(registry.NATIVE_MISSING is not None, reason="there is no native library")
@pytest.mark.parametrize("name", ["of_tomorrow", "bias"])
def test_a_library_without_the_primitive_is_not_declared(name):
    """Nor is one with another whose name begins so."""
    from gankern.core.dispatch import Primitive

    try:
        primitive = registry.declare(name, gradient_order=2)
        with pytest.raises(ValueError, match="built from other sources"):
            primitive.select(torch.zeros(2), "cpu")
        assert primitive.select(torch.zeros(2), "auto") != "cpu"
    finally:
        Primitive.registry.pop(name)
