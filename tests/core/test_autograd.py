"""The shape that all primitives' autograd has: which gradients are computed, and in what order they end."""

import contextlib

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

import gankern.functional as GF
from gankern.core import autograd, native

asked = []  # what the functions of the rule below were asked for


def _forward(options, x, w, b):
    return (x * w if b is None else x * w + b,)


def _backward(options, needed, grads, saved):
    asked.append(("backward", needed))
    x, w, b = saved
    return [wanted if need else None for need, wanted in zip(needed, (grads[0] * w, grads[0] * x, 1 * grads[0]))]


def _double_backward(options, needed, grad_grads, grads, saved):
    asked.append(("double backward", needed))
    (hx, hw, hb), (x, w, _), (g,) = grad_grads, saved, grads

    def total(*terms):
        present = [a * c for a, c in terms if a is not None]
        return sum(present) if present else None

    one = torch.ones_like(g)
    results = total((hx, w), (hw, x), (hb, one)), total((hw, g)), total((hx, g)), None
    return [result if need else None for need, result in zip(needed, results)]


autograd.Rule(
    "test_product",
    _forward,
    lambda options, tensors, outputs: tensors,
    _backward,
    _double_backward,
    asks_engine=True,
)


def product(x, w, b=None):
    return autograd.differentiate("test_product", (), x, w, b)[0]


@pytest.fixture
def tensors():
    asked.clear()
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]


def test_exact(tensors):
    for inputs in (tensors, tensors[:2]):
        assert gradcheck(product, inputs)
        assert gradgradcheck(product, inputs)


@pytest.mark.parametrize("leaves", [True, False])
def test_only_what_is_asked_for_is_computed(tensors, leaves):
    x, w, b = tensors if leaves else [t * 2 for t in tensors]
    for wanted, needed in (
        ([x], (True, False, False)),
        ([w], (False, True, False)),
        ([x, b], (True, False, True)),
        ([x, w, b], (True, True, True)),
    ):
        asked.clear()
        grad(product(x, w, b).sum(), wanted, retain_graph=True)
        assert asked == [("backward", needed)]


def test_a_missing_tensor_does_not_shift_the_others(tensors):
    x, w, _ = tensors
    grad(product(x, w).sum(), [w])
    assert asked == [("backward", (False, True, False))]


def test_backward_asks_for_all_and_for_its_inputs(tensors):
    x, w, b = tensors
    product(x, w, b).sum().backward()
    assert asked.pop() == ("backward", (True, True, True))
    product(x, w, b).sum().backward(inputs=[w])
    assert asked.pop() == ("backward", (False, True, False))


def test_a_penalty_written_by_hand_computes_no_weight_gradient_inside(tensors):
    x, w, b = tensors
    (gx,) = grad(product(x, w, b).sum(), x, create_graph=True)
    assert asked == [("backward", (True, False, False))]
    asked.clear()
    gx.square().sum().backward(inputs=[w])
    # Of (incoming gradient, x, w, b): the incoming one is a constant.
    assert asked == [("double backward", (False, False, True, False))]
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_no_second_derivative_is_none_and_not_zeros(tensors):
    x, w, b = tensors
    (gx,) = grad(product(x, w, b).sum(), x, create_graph=True)
    assert grad(gx.sum(), x, allow_unused=True) == (None,)


def test_under_torch_func(tensors):
    x, w, b = tensors
    gx = torch.func.grad(lambda x: product(x, w, b).square().sum())(x)
    torch.testing.assert_close(gx, 2 * (x * w + b) * w)


def test_a_third_order_raises(tensors):
    x, w, _ = tensors
    y = product(x * 1, w * 1)
    (gx,) = grad(y.square().sum(), x, create_graph=True)
    (ggx,) = grad(gx.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="test_product: .*gradient order 2"):
        grad(ggx.sum(), w)


@pytest.mark.parametrize("python", [False, True], ids=["nodes", "python"])
def test_tensors_made_in_inference_mode_are_taken(python):
    """Where none of them needs a gradient; of their versions, which are not counted, nobody asks."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        x, w, u, v = (torch.randn(*size, generator=generator) for size in ((2, 3, 4), (4, 3), (4,), (3,)))
    with native.python_gradients() if python else contextlib.nullcontext():
        right = x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
        torch.testing.assert_close(GF.pixel_norm(x), right)
        torch.testing.assert_close(GF.spectral_norm(w, u, v, training=False), w / (u @ w @ v))
