"""Penalties are what they are by hand for whatever layout the samples have, although on the CPU the tangent form lays
images out channels_last: critics that go by the layout, and torch's batch norm, whose backward does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import Applied
from torch import nn

from gankern.penalties import r1_penalty

FORMATS = (torch.contiguous_format, torch.channels_last)


class Critic(nn.Module):
    def __init__(self, first, body=nn.Identity):
        super().__init__()
        self.first, self.conv, self.body, self.head = first, nn.Conv2d(2, 2, 3, padding=1), body(), nn.Linear(32, 1)

    def forward(self, x):
        return self.head(self.body(self.conv(self.first(x))).tanh().flatten(1))


def _by_hand(critic, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    penalty = 5 * g.square().sum() / len(x)
    penalty.backward()
    return penalty


def _check(critic, x, method, right=None):
    ours, right = copy.deepcopy(critic), copy.deepcopy(right or critic)
    want = _by_hand(right, x)
    came = r1_penalty(ours, x, method=method)
    came.backward()
    torch.testing.assert_close(came, want)
    for p, q in zip(ours.parameters(), right.parameters()):
        assert (p.grad is None) == (q.grad is None)
        torch.testing.assert_close(p.grad, q.grad)
    return ours, right


def _overwrites_a_copy(x):
    return x.contiguous(memory_format=torch.channels_last if x.is_contiguous() else torch.contiguous_format).mul_(2)


def _overwrites_a_channels_last_copy(x):
    y = x.contiguous(memory_format=torch.channels_last)
    return y.mul_(2) if y is not x else y * 2


def _overwrites_unseen(x):
    y = x.tanh().contiguous(memory_format=torch.channels_last)
    x.contiguous(memory_format=torch.channels_last).detach().mul_(0 if x.is_contiguous() else 1)
    return y * x


def _in_the_order_of_memory(x):
    return x * torch.arange(x.numel(), dtype=x.dtype).as_strided(x.shape, x.stride())


def _and_itself(overwrite):
    """What depends on whether the tensor that is overwritten is a view of h, or a copy."""

    def function(x):
        h = 2 * x.tanh()
        overwrite(h)
        return h.sin()

    return function


def _beside(copy):
    def function(x):
        h = 2 * x.tanh()
        return copy(h).mul_(0.5).sum() * h.sin() + h

    return function


def _without_gradient(copy):
    def overwrite(h):
        with torch.no_grad():
            copy(h).mul_(0.5)

    return overwrite


GOES_BY_THE_LAYOUT = {
    "flatten() is overwritten": _and_itself(lambda h: h.flatten(1).mul_(2)),
    "view() is overwritten": _and_itself(lambda h: h.view(len(h), -1).mul_(2)),
    "reshape() is overwritten by an activation": _and_itself(lambda h: F.leaky_relu_(h.reshape(len(h), -1))),
    "contiguous() is overwritten": _and_itself(lambda h: h.contiguous().add_(1)),
    "a view of contiguous() is overwritten": _and_itself(lambda h: h.contiguous().view(len(h), -1)[:, :3].add_(1)),
    "values are overwritten": _and_itself(lambda h: h.detach().permute(0, 2, 3, 1).contiguous().mul_(0.5)),
    "flat values are overwritten": _and_itself(lambda h: h.detach().flatten(1).mul_(0.5)),
    "overwritten in no_grad": _and_itself(_without_gradient(lambda h: h.permute(0, 2, 3, 1).reshape(len(h), -1))),
    "flat, in no_grad": _and_itself(_without_gradient(lambda h: h.flatten(1))),
    "channels last": _beside(lambda h: h.permute(0, 2, 3, 1).contiguous()),
    "values, channels last": _beside(lambda h: h.detach().permute(0, 2, 3, 1).reshape(-1, 2)),
    "values, channels_last": _beside(lambda h: h.detach().contiguous(memory_format=torch.channels_last)),
    "is_contiguous()": lambda x: 2 * x if x.is_contiguous() else 3 * x.sin(),
    "is_contiguous() of what is made": lambda x: (lambda y: 2 * y if y.is_contiguous() else 3 * y.sin())(x.tanh()),
    "stride()": lambda x: x * x.stride(1),
    "dim_order()": lambda x: x * x.dim_order()[1],
    "by the strides": _in_the_order_of_memory,
    "a copy is overwritten": _overwrites_a_copy,
    "a channels_last copy is overwritten": _overwrites_a_channels_last_copy,
    "a copy is overwritten where autograd does not see it": _overwrites_unseen,
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("method", ("auto", "double_backward"))
@pytest.mark.parametrize("name", GOES_BY_THE_LAYOUT)
def test_a_critic_that_goes_by_the_layout(name, method, memory_format):
    torch.manual_seed(0)
    critic = Critic(Applied(GOES_BY_THE_LAYOUT[name])).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
    try:
        _by_hand(copy.deepcopy(critic), x)
    except RuntimeError:  # such as of a view that this format does not have
        with pytest.raises(RuntimeError):
            _check(critic, x, method)
        return
    _check(critic, torch.randn(3, 2, 4, 4, dtype=torch.float64).contiguous(memory_format=memory_format), method)


def test_a_copy_that_is_none_is_overwritten_by_the_tangent_form_too():
    torch.manual_seed(0)
    critic = Critic(Applied(lambda x: x.contiguous(memory_format=torch.channels_last).mul_(2))).double()
    _check(critic, torch.randn(3, 2, 4, 4, dtype=torch.float64), "tangent")


class ByFormula(nn.Module):
    """Instance norm and, for one sample, batch norm in training mode."""

    def __init__(self, gains=None):
        super().__init__()
        self.weight, self.bias = (None, None) if gains is None else (gains.weight, gains.bias)

    def forward(self, x):
        dims = tuple(range(2, x.ndim))
        centred = x - x.mean(dims, keepdim=True)
        y = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        if self.weight is None:
            return y
        return y * self.weight.view(-1, *[1] * len(dims)) + self.bias.view(-1, *[1] * len(dims))


class InThreeDimensions(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.unflatten(2, (2, 2))).flatten(2, 3)


class BehindAView(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.view(x.shape)).view(x.shape)


NORMS = {
    "instance norm": lambda: nn.InstanceNorm2d(2),
    "instance norm with gains": lambda: nn.InstanceNorm2d(2, affine=True),
    "instance norm with statistics": lambda: nn.InstanceNorm2d(2, track_running_stats=True),
    "instance norm in 3-D": lambda: InThreeDimensions(nn.InstanceNorm3d(2)),
    "batch norm": lambda: nn.BatchNorm2d(2),
    "batch norm without statistics": lambda: nn.BatchNorm2d(2, affine=False, track_running_stats=False),
    "batch norm behind a view": lambda: BehindAView(nn.BatchNorm2d(2)),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("method", ("tangent", "double_backward"))
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("ignore:.*batch norm in training mode")
def test_norms_of_one_sample(name, method, memory_format):
    """torch's own backward is wrong for some strides of a batch of one: so the oracle is the formula."""
    torch.manual_seed(0)
    critic = Critic(nn.Tanh(), NORMS[name]).double()
    norm = getattr(critic.body, "norm", critic.body)
    if norm.affine:
        nn.init.normal_(norm.weight)
    by_formula = copy.deepcopy(critic)
    gains = getattr(by_formula.body, "norm", by_formula.body)
    by_formula.body = ByFormula(gains if gains.affine else None)
    if isinstance(critic.body, InThreeDimensions):
        by_formula.body = InThreeDimensions(by_formula.body)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
    if method == "double_backward" and memory_format is torch.channels_last:
        pytest.skip("torch's own gradient of a channels_last image, which this library leaves as it is")
    _check(critic, x, method, by_formula)


@pytest.mark.parametrize("norm", (nn.BatchNorm2d, nn.InstanceNorm2d))
@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("method", ("auto", "tangent", "double_backward"))
@pytest.mark.filterwarnings("ignore:.*batch norm in training mode")
def test_running_statistics_move_once(norm, momentum, method):
    torch.manual_seed(0)
    critic = Critic(nn.Tanh(), lambda: norm(2, momentum=momentum, track_running_stats=True)).double()
    ours, right = _check(critic, torch.randn(1, 2, 4, 4, dtype=torch.float64), method)
    for a, b in zip(ours.buffers(), right.buffers()):
        torch.testing.assert_close(a, b)
    assert norm is nn.InstanceNorm2d or right.body.num_batches_tracked == 1


def test_evaluation_of_one_sample_behind_views():
    torch.manual_seed(0)
    critic = Critic(nn.Tanh(), lambda: BehindAView(nn.BatchNorm2d(2)))
    critic = critic.double().eval()
    right = copy.deepcopy(critic)
    right.body = Applied(lambda x: F.conv2d(x, torch.eye(2).double()[:, :, None, None] / (1 + 1e-5) ** 0.5))
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    ours = r1_penalty(critic, x, method="tangent")
    torch.testing.assert_close(ours, _by_hand(right, x).detach())
