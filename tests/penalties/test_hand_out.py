"""How a penalty hands out gradients that are there already, in C++ and in Python."""

import pytest
import torch

from gankern.penalties._common import hand_out

pytestmark = pytest.mark.usefixtures("way")


def leaves(*dtypes):
    return [torch.zeros(2, 3, dtype=dtype, requires_grad=True) for dtype in dtypes]


def test_each_target_gets_its_gradient_times_what_comes(way):
    targets = leaves(torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float32)
    gradients = [torch.randn_like(t) for t in targets]
    gradients[0] = torch.randn(3, 2).t()
    gradients[3] = None
    value = torch.tensor(2.0)
    handed = hand_out(value, targets, gradients)
    assert handed.item() == 2.0 and handed.data_ptr() != value.data_ptr()
    assert ("GankernBackward" in type(handed.grad_fn).__name__ or "Gankern" in handed.grad_fn.name()) == (way == "C++")
    (3 * handed + handed).backward()
    for target, gradient in zip(targets, gradients):
        if gradient is None:
            assert target.grad is None
        else:
            assert target.grad.dtype == target.dtype
            assert torch.equal(target.grad, gradient * torch.tensor(4.0, dtype=gradient.dtype))


@pytest.mark.parametrize("scale", [2.0**17, 1e-6])
def test_a_scale_outside_of_the_range_of_half_precision(scale):
    targets = leaves(torch.float16, torch.float32)
    gradients = [torch.full_like(t, 100 / scale) for t in (targets[1], targets[1])]
    gradients[0] = gradients[0].clamp(max=6e4).half()
    handed = hand_out(torch.tensor(1.0), targets, gradients)
    (scale * handed).backward()
    for target, gradient in zip(targets, gradients):
        assert torch.equal(target.grad, (gradient.float() * scale).to(target.dtype))


def test_a_part_and_once_more():
    first, second = leaves(torch.float32, torch.float32)
    handed = hand_out(torch.tensor(0.5), [first, second], [torch.ones(2, 3), torch.full((2, 3), 5.0)])
    (only,) = torch.autograd.grad(handed, second, retain_graph=True)
    assert torch.equal(only, torch.full((2, 3), 5.0))
    handed.backward(torch.tensor(2.0))
    assert torch.equal(first.grad, torch.full((2, 3), 2.0))
    with pytest.raises(RuntimeError, match="second time"):
        handed.backward()


def test_without_a_target_that_is_trained():
    fixed = torch.zeros(2)
    assert not hand_out(torch.tensor(1.0), [fixed], [torch.ones(2)]).requires_grad
    (target,) = leaves(torch.float32)
    with torch.no_grad():
        assert not hand_out(torch.tensor(1.0), [target], [torch.ones(2, 3)]).requires_grad


def test_no_second_derivative_goes_through_it():
    (target,) = leaves(torch.float32)
    scale = torch.tensor(3.0, requires_grad=True)
    handed = hand_out(torch.tensor(1.0), [target], [torch.ones(2, 3)])
    (gradient,) = torch.autograd.grad(scale * handed, target, create_graph=True)
    assert torch.equal(gradient, torch.full((2, 3), 3.0))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_no_second_derivative_goes_to_what_came_in():
    """A penalty's weight that is learned: its own gradient is there, that of the gradients would be left out."""
    (target,) = leaves(torch.float32)
    scale = torch.tensor(3.0, requires_grad=True)
    loss = target.exp().sum() * scale + hand_out(torch.tensor(1.5), [target], [torch.ones(2, 3)]) * scale
    (direct,) = torch.autograd.grad(loss, scale, retain_graph=True)
    assert direct.item() == 7.5
    (gradient,) = torch.autograd.grad(loss, target, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice a penalty"):
        torch.autograd.grad(gradient.sum(), scale)


def test_no_second_derivative_goes_through_its_part_of_a_sum():
    """The other part can be differentiated again, so a gradient without this one's part would be a silent mistake."""
    (target,) = leaves(torch.float32)
    loss = target.exp().sum() + hand_out(torch.tensor(1.0), [target], [torch.ones(2, 3)])
    (gradient,) = torch.autograd.grad(loss, target, create_graph=True)
    assert torch.equal(gradient, torch.full((2, 3), 2.0))
    for again in (torch.Tensor.backward, lambda x, **options: torch.autograd.grad(x, target, **options)):
        with pytest.raises(RuntimeError, match="differentiate twice a penalty"):
            again(gradient.sum(), retain_graph=True)
    loss = target.exp().sum() + hand_out(torch.tensor(1.0), [target], [None])
    (gradient,) = torch.autograd.grad(loss, target, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), target)
    assert torch.equal(second, torch.ones(2, 3))


def test_a_batch_of_gradients():
    (target,) = leaves(torch.float32)
    handed = hand_out(torch.tensor(1.0), [target], [torch.ones(2, 3)])
    (gradients,) = torch.autograd.grad(handed, target, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert torch.equal(gradients[1], torch.full((2, 3), 2.0))
