"""Compiled autograd over the C++ nodes: the same gradients, of both orders, and what was compiled is taken again only
for the same call."""

import pytest
import torch
import torch._dynamo.testing
from common import needs_nodes
from torch._dynamo import compiled_autograd

import gankern.functional as GF


def _running(x):
    return torch.zeros(x.shape[1]), torch.ones(x.shape[1])


def _taps():
    return torch.tensor([1.0, 3.0, 2.0]) / 6


# (a call, shapes of its tensors); pairs that differ in an option alone stand one after the other.
CALLS = {
    "tanh": (lambda x, b: GF.bias_act(x, b, activation="tanh"), [(3, 4, 5), (4,)]),
    "tanh, gain": (lambda x, b: GF.bias_act(x, b, activation="tanh", gain=1.5), [(3, 4, 5), (4,)]),
    "sigmoid": (lambda x, b: GF.bias_act(x, b, activation="sigmoid"), [(3, 4, 5), (4,)]),
    "no bias": (lambda x: GF.bias_act(x, activation="tanh"), [(3, 4, 5)]),
    "slope": (lambda x, b: GF.bias_act(x, b, activation="leaky_relu"), [(3, 4, 5), (4,)]),
    "another slope": (
        lambda x, b: GF.bias_act(x, b, activation="leaky_relu", negative_slope=0.3),
        [(3, 4, 5), (4,)],
    ),
    "leaky_relu behind another": (lambda x, w: GF.leaky_relu(x @ w, 0.2), [(3, 4), (4, 2)]),
    "relu": (lambda x: GF.relu(x), [(3, 4)]),
    "pixel_norm": (lambda x: GF.pixel_norm(x), [(3, 4, 2)]),
    "pixel_norm, overwritten": (lambda x: GF.pixel_norm(x * 1.0).mul_(2), [(3, 4, 2)]),
    "bias_act_pixel_norm": (lambda x, b: GF.bias_act_pixel_norm(x, b, gain=0.7), [(3, 4, 2), (4,)]),
    "minibatch_stddev": (lambda x: GF.minibatch_stddev(x, group_size=2), [(4, 4, 2, 2)]),
    "minibatch_stddev, in fours": (lambda x: GF.minibatch_stddev(x, group_size=4), [(4, 4, 2, 2)]),
    "batch_norm_act": (
        lambda x, w, b: GF.batch_norm_act(x, *_running(x), w, b, True, activation="relu"),
        [(3, 4, 5), (4,), (4,)],
    ),
    "batch_norm_act, evaluated": (
        lambda x, w, b: GF.batch_norm_act(x, *_running(x), w, b, False, activation="relu"),
        [(3, 4, 5), (4,), (4,)],
    ),
    "instance_norm_act": (lambda x, w: GF.instance_norm_act(x, weight=w), [(3, 4, 5), (4,)]),
    "virtual_batch_norm": (
        lambda x, m, s: GF.virtual_batch_norm(x, m, s.square() + m.square() + 1, 4, activation="leaky_relu"),
        [(3, 4, 5), (4,), (4,)],
    ),
    "minibatch_discrimination": (lambda x, t: GF.minibatch_discrimination(x, t), [(4, 3), (3, 2, 2)]),
    "gradient_penalty": (lambda g: GF.gradient_penalty(g, target=1.5), [(3, 4)]),
    "upfirdn2d": (lambda x: GF.upfirdn2d(x, _taps(), up=2, padding=1), [(2, 3, 4, 4)]),
    "upfirdn2d, down": (lambda x: GF.upfirdn2d(x, _taps(), down=2, padding=1), [(2, 3, 4, 4)]),
    "spectral_norm": (
        lambda w: GF.spectral_norm(w, torch.ones(3), torch.ones(8), training=False),
        [(3, 4, 2)],
    ),
    "upsample_conv2d": (lambda x, w: GF.upsample_conv2d(x, w), [(2, 8, 8, 8), (8, 8, 3, 3)]),
    "upsample_conv2d, scaled": (lambda x, w: GF.upsample_conv2d(x, w, weight_scale=0.5), [(2, 8, 8, 8), (8, 8, 3, 3)]),
    "conv2d_downsample": (lambda x, w: GF.conv2d_downsample(x, w), [(2, 8, 8, 8), (8, 8, 3, 3)]),
}


def gradients(call, shapes, compiler=None):
    """Of a loss and its penalty, as a critic's step has them; by ``compiler`` of each captured backward."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    y = call(*leaves)
    (g,) = torch.autograd.grad(y.tanh().sum(), leaves[0], create_graph=True)
    loss = y.sin().sum() + g.square().sum()
    penalty_alone = g.sum()
    for value in (loss, penalty_alone):
        if not value.requires_grad:
            continue
        if compiler is not None:
            with compiled_autograd._enable(compiler):
                value.backward(retain_graph=True)
        else:
            value.backward(retain_graph=True)
    return [leaf.grad for leaf in leaves]


def check(name, compiler):
    expected, found = gradients(*CALLS[name]), gradients(*CALLS[name], compiler)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")


@needs_nodes
def test_the_same_gradients():
    """By what is captured, as it is."""
    captured = []

    def capture(graph):
        captured.append(name)
        return graph

    torch._dynamo.reset()
    for turn in range(2):
        for name in CALLS:
            check(name, capture)
        if turn == 0:
            assert set(captured) == set(CALLS)
            captured.clear()
    assert captured == []  # again


# A node of each class of csrc/autograd; what it runs is for torch.compile the same call whatever the primitive.
COMPILED = ["tanh", "slope", "leaky_relu behind another", "batch_norm_act"]


@needs_nodes
def test_the_same_gradients_by_torch_compile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for turn in range(2):  # the second time nothing is compiled
        for name in COMPILED:
            with torch._dynamo.config.patch(error_on_recompile=bool(turn)):
                check(name, torch.compile(backend=counter))
    assert counter.frame_count >= len(COMPILED)


@needs_nodes
def test_only_what_is_asked_for():
    """As `backward(inputs=...)` says."""
    x, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = GF.bias_act(x, b, activation="leaky_relu")
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.sum().backward(inputs=[b])
    assert x.grad is None
    torch.testing.assert_close(b.grad, torch.where(y > 0, 1.0, 0.2).sum(0))


@needs_nodes
def test_a_gradient_of_third_order_is_refused():
    x = torch.randn(3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(GF.bias_act(x, activation="tanh").sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="exact to gradient order 2"):
        with compiled_autograd._enable(torch.compile(backend="eager")):
            h.sin().sum().backward()
