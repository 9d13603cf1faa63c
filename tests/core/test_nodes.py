"""The C++ autograd nodes: the same as the Python Functions, to the bit, and no more than that is asked for."""

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from common import in_threads, needs_nodes
from torch.utils._python_dispatch import TorchDispatchMode

import gankern.functional as GF
from gankern.core import native
from gankern.core.dispatch import Primitive, last_implementation
from gankern.core.torch_internals import graph_nodes
from gankern.functional.spectral_norm import spectral_norm_ahead
from gankern.measure import host
from gankern.ops import convolution, convolution_choice

ROOT = Path(__file__).resolve().parents[2]
# Calls of each primitive: (the call, shapes of its tensors).
CALLS = {
    "bias_act": (lambda x, b: GF.bias_act(x, b, activation="leaky_relu"), [(3, 4, 5), (4,)]),
    "bias_act, curved": (lambda x, b: GF.bias_act(x, b, activation="tanh", gain=1.5, clamp=1.2), [(3, 4, 5), (4,)]),
    "bias_act, input kept": (lambda x, b: GF.bias_act(x, b, activation="silu"), [(3, 4, 5), (4,)]),
    "pixel_norm": (lambda x: GF.pixel_norm(x), [(3, 4, 5)]),
    "bias_act_pixel_norm": (lambda x, b: GF.bias_act_pixel_norm(x, b, gain=0.7), [(3, 4, 5), (4,)]),
    "minibatch_stddev": (lambda x: GF.minibatch_stddev(x, group_size=2, num_channels=2), [(4, 4, 2, 2)]),
    "batch_norm_act": (lambda x, w, b: _batch_norm(x, w, b, True), [(3, 4, 5), (4,), (4,)]),
    "batch_norm_act, evaluated": (lambda x, w, b: _batch_norm(x, w, b, False), [(3, 4, 5), (3, 4), (3, 4)]),
    "instance_norm_act": (
        lambda x, w, b: GF.instance_norm_act(x, None, None, *_widened(x, w, b), activation="leaky_relu"),
        [(3, 4, 5), (4,), (4,)],
    ),
    "instance_norm_act, adaptive": (
        lambda x, w, b: GF.instance_norm_act(x, None, None, *_widened(x, w, b), activation="relu"),
        [(3, 4, 5, 2), (3, 4), (3, 4)],
    ),
    "group_norm_act": (
        lambda x, w, b: GF.group_norm_act(x, 2, *_widened(x, w, b), activation="leaky_relu"),
        [(3, 4, 5), (4,), (4,)],
    ),
    "group_norm_act, each sample's": (
        lambda x, w, b: GF.group_norm_act(x, 2, *_widened(x, w, b), activation="relu"),
        [(3, 4, 5), (3, 4), (3, 4)],
    ),
    "instance_norm_act, no values": (lambda x: GF.instance_norm_act(x), [(3, 4, 5)]),
    "batch_norm_act, no statistics": (lambda x: GF.batch_norm_act(x, None, None, training=True), [(3, 4, 5)]),
    "l1_similarity": (lambda m: GF.l1_similarity(m, include_self=True), [(4, 2, 3)]),
    "l1_similarity, two sets": (lambda m, other: GF.l1_similarity(m, other), [(4, 2, 3), (3, 2, 3)]),
    "minibatch_discrimination": (lambda x, t: GF.minibatch_discrimination(x, t), [(4, 3), (3, 2, 2)]),
    "minibatch_discrimination, mean": (
        lambda x, t: GF.minibatch_discrimination(x, t, reduction="mean"),
        [(4, 3), (3, 2, 2)],
    ),
    "self_attention2d": (GF.self_attention2d, [(2, 3, 4, 6), (2, 3), (2, 3), (4, 3, 1, 1), (3, 4), ()]),
    "virtual_batch_norm": (
        lambda x, m, s, w, b: GF.virtual_batch_norm(x, m, s.square() + m.square() + 1, 4, w, b),
        [(3, 4, 5), (4,), (4,), (4,), (4,)],
    ),
    "virtual_batch_norm, relu": (
        lambda x, m, s: GF.virtual_batch_norm(x, m, s.square() + m.square() + 1, None, activation="relu"),
        [(3, 4, 5), (4,), (4,)],
    ),
    "virtual_batch_norm_statistics": (lambda x: GF.virtual_batch_norm_statistics(x), [(3, 4, 5)]),
    "relu": (lambda x: GF.relu(x), [(3, 4, 5)]),
    "leaky_relu": (lambda x: GF.leaky_relu(x, 0.2), [(3, 4, 5)]),
    "upfirdn2d": (
        lambda x: GF.upfirdn2d(x, _taps(x), up=(2, 1), down=(1, 2), padding=(1, -1, 2, 0), gain=1.5),
        [(2, 3, 5, 4)],
    ),
    "upsample2d": (lambda x: GF.upsample2d(x, _taps(x), padding=1), [(2, 3, 4, 4)]),
    "downsample2d": (lambda x: GF.downsample2d(x, _taps(x)[0], padding=(0, 1)), [(2, 3, 6, 4)]),
    "filter2d": (lambda x: GF.filter2d(x, _taps(x), flip_filter=True), [(2, 3, 4, 4)]),
    "gradient_penalty": (lambda g: GF.gradient_penalty(g, target=1.5), [(3, 4, 5)]),
    "spectral_norm": (lambda w: GF.spectral_norm(w, *_vectors(w), training=False), [(3, 4, 2)]),
    "spectral_norm, a group": (
        lambda a, b: GF.spectral_norm_group([a, b], *zip(_vectors(a, 1), _vectors(b)), dims=[1, 0], training=False),
        [(3, 4, 2), (5, 3)],
    ),
}

# A primitive without a call of its own: its case of the smallest tensors.
for _name in Primitive.registry.keys() - {name.partition(",")[0] for name in CALLS} - {"convolution"}:
    if hasattr(native.nodes, _name):
        _case = host.cases([_name])[0]
        _shapes = [tuple(x.shape) for x in _case.make(torch.float64, "cpu")]
        CALLS[_name] = (lambda *given, _run=_case.run: _run(None, given), _shapes)

LINEAR = ("upfirdn2d", "upsample2d", "downsample2d", "filter2d", "relu", "leaky_relu")


def _batch_norm(x, w, b, training):
    mean, var = (torch.full((4,), v, dtype=torch.promote_types(x.dtype, torch.float32)) for v in (0.1, 1.2))
    w, b = (t.to(mean.dtype) for t in (w, b))
    return GF.batch_norm_act(x, mean, var, w, b, training, activation="leaky_relu")


def _widened(x, *values):
    return [v.to(torch.promote_types(x.dtype, torch.float32)) for v in values]


def _taps(x):
    return torch.tensor([[1.0, 3.0, 3.0], [0.5, -1.0, 2.0]], dtype=x.dtype) / 8


def _vectors(w, dim=0):
    """u and v that belong to no singular value: the gradient is then that of u^T W v alone."""
    w = w.detach()
    return torch.ones(w.shape[dim], dtype=w.dtype), torch.ones(w.numel() // w.shape[dim], dtype=w.dtype)


def tensors_of(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def outputs_of(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def by_nodes(y):
    """Whether a result comes from a node of the C++ library."""
    return any(callable(node.name) and node.name().startswith("GankernBackward_") for node in graph_nodes(y))


def orders(call, tensors):
    """Results, first and second gradients; None where there is none."""
    ys = outputs_of(call(*tensors))
    generator = torch.Generator().manual_seed(1)

    def like(t):
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    gs = [like(y).requires_grad_() for y in ys]
    first = torch.autograd.grad(ys, tensors, gs, create_graph=True, allow_unused=True)
    present = [g for g in first if g is not None]
    hs = [like(g) for g in present]
    second = torch.autograd.grad(present, [*tensors, *gs], hs, allow_unused=True)
    return [*ys, *first, *second]


@needs_nodes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_as_python_to_the_bit(name, dtype):
    call, shapes = CALLS[name]
    ours = orders(call, tensors_of(shapes, dtype))
    assert by_nodes(outputs_of(call(*tensors_of(shapes, dtype)))[0])
    with native.python_gradients():
        theirs = orders(call, tensors_of(shapes, dtype))
        assert not by_nodes(outputs_of(call(*tensors_of(shapes, dtype)))[0])
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.stride() == b.stride() and a.dtype == b.dtype
            assert torch.equal(a, b)


# Kind, padding, shapes of x, weight and bias; of sizes at which the engine's rows are the fastest way of some pass.
CONVOLUTIONS = {
    "same": (lambda x, w, b: GF.conv2d(x, w, b, padding=1, weight_scale=0.5), (16, 8, 3, 3)),
    "same, not padded": (lambda x, w, b: GF.conv2d(x, w, b), (16, 8, 3, 3)),
    "strided": (lambda x, w, b: GF.conv2d(x, w, b, stride=2, padding=1), (16, 8, 4, 4)),
    "transposed": (lambda x, w, b: GF.conv_transpose2d(x, w, b, stride=2, padding=1), (8, 16, 4, 4)),
    "upsample": (lambda x, w, b: GF.upsample_conv2d(x, w, b), (16, 8, 3, 3)),
    "downsample": (lambda x, w, b: GF.conv2d_downsample(x, w, b, weight_scale=2.0), (16, 8, 3, 3)),
}


@needs_nodes
@pytest.mark.parametrize("ways", ["measured", "rows", "torch", "mixed"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_the_same_to_the_bit_in_any_order(kind, memory_format, ways, monkeypatch):
    call, shape = CONVOLUTIONS[kind]
    name = kind.partition(",")[0]
    rows = list(convolution.KINDS[name].rows)
    chosen = {
        "rows": lambda which: rows[0],
        "torch": lambda which: "torch",
        "mixed": lambda which: rows[0] if which == "transpose" else "torch",
    }
    if ways != "measured":
        # Another number of channels for each set of ways: the nodes keep the ways of a shape.
        shape = tuple(n + list(chosen).index(ways) + 1 if n > 4 else n for n in shape)
        monkeypatch.setattr(convolution_choice, "way_for", lambda kind, which, *rest: chosen[ways](which))
    generator = torch.Generator().manual_seed(0)
    inside, outside = (shape[0], shape[1]) if name == "transposed" else (shape[1], shape[0])

    def run():
        x = torch.randn(3, inside, 8, 6, generator=generator.manual_seed(0))
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        w = torch.randn(shape, generator=generator).requires_grad_()
        b = torch.randn(outside, generator=generator).requires_grad_()
        y = call(x, w, b)
        results = [y]
        for _ in range(3):
            value = sum((r * torch.randn(r.shape, generator=generator)).sum() for r in results[-3:] if r is not None)
            grads = torch.autograd.grad(value.sin(), (x, w, b), create_graph=True, allow_unused=True)
            results += grads
        with torch.no_grad():
            results.append(call(x, w, b))
        return results, last_implementation("convolution")

    ours, ran = run()
    with native.python_gradients():
        theirs, ran_by_python = run()
    assert ran == ran_by_python
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.stride() == b.stride() and torch.equal(a, b))
    # Where all passes are torch's, so is the convolution.
    assert ways == "measured" or by_nodes(ours[0]) == (ways != "torch")


@needs_nodes
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: GF.conv2d(x, w),
        lambda x, w: GF.conv2d(x, w, padding="same"),
        lambda x, w: GF.conv2d(x, w, stride=(2, 1), padding=(0, 3), dilation=2),
        lambda x, w: GF.conv2d(x[0], w),
        lambda x, w: GF.conv2d(x, w, stride=3, weight_scale=0.3),
        lambda x, w: GF.conv2d(x, w, w[:, 0, 0, 0], dilation=2, weight_scale=0.3),
        lambda x, w: GF.conv2d(x[0], w, w[:, 0, 0, 0], stride=3, weight_scale=0.3),
        lambda x, w: GF.conv_transpose2d(x, w.transpose(0, 1), stride=2, output_padding=1),
    ],
)
def test_what_is_of_no_kind_is_torchs(call):
    x, w = tensors_of([(2, 4, 9, 9), (3, 4, 5, 5)], torch.float32)
    ours = torch.autograd.grad(call(x, w).sin().sum(), (x, w))
    with native.python_gradients():
        theirs = torch.autograd.grad(call(x, w).sin().sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and not by_nodes(call(x, w))
    assert last_implementation("convolution") == "reference"


@needs_nodes
@pytest.mark.parametrize("leaky", [False, True])
def test_activations_at_special_values_and_in_place(leaky):
    values = [-2.0, -0.0, 0.0, 3.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40]

    def run(in_place):
        x = torch.tensor(values * 8).requires_grad_()
        z = x * 1.0
        y = GF.leaky_relu(z, 0.2, in_place) if leaky else GF.relu(z, in_place)
        assert (y is z) == in_place
        return [y, *torch.autograd.grad(y, x, torch.arange(1.0, 73.0))]

    for in_place in (False, True):
        ours = run(in_place)
        assert by_nodes(ours[0])
        with native.python_gradients():
            theirs = run(in_place)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        x = torch.tensor(values * 8)
        plain = torch.nn.functional.leaky_relu(x, 0.2) if leaky else torch.relu(x)
        assert torch.equal(ours[0].view(torch.int32), plain.view(torch.int32))  # zeros' signs are torch's


@needs_nodes
@pytest.mark.parametrize("python", [False, True], ids=["nodes", "python"])
@pytest.mark.parametrize("name", CALLS)
def test_exact(name, python):
    call, shapes = CALLS[name]
    with native.python_gradients() if python else contextlib.nullcontext():
        tensors = tensors_of(shapes)
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


@needs_nodes
def test_buffers_are_written_as_by_python():
    def run():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 4, 3, generator=generator).requires_grad_()
        mean, var = torch.zeros(4), torch.ones(4)
        versions = mean._version, var._version
        GF.batch_norm_act(x, mean, var, training=True, momentum=0.3)
        assert (mean._version, var._version) > versions
        w = torch.randn(5, 4, 3, generator=generator)
        pairs = [
            (torch.randn(5, generator=generator), torch.randn(12, generator=generator)),
            (torch.randn(4, generator=generator).double(), torch.randn(30, generator=generator)[::2]),
        ]
        sigmas = [torch.zeros(1), torch.zeros(1, 1)]
        versions = [t._version for pair in pairs for t in pair]
        us, vs = zip(*pairs)
        GF.spectral_norm_group([w, w], us, vs, dims=[0, 1], sigmas=sigmas, n_power_iterations=2)
        assert all(t._version > v for t, v in zip([t for pair in pairs for t in pair], versions))
        before = [t.clone() for pair in pairs for t in pair]
        GF.spectral_norm_group([w, w], us, vs, dims=[0, 1], sigmas=sigmas, training=False)
        assert all(torch.equal(t, b) for t, b in zip([t for pair in pairs for t in pair], before))
        return [mean, var, *us, *vs, *sigmas]

    ours = run()
    with native.python_gradients():
        theirs = run()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@needs_nodes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_ahead_is_the_group_that_writes_nothing(dtype, training):
    def run(ahead):
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 4, 2), (5, 3), (3,), (5,), (8,), (3,), (1,), (1, 1)]
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        (a, b), us, vs, sigmas = (tensors[i : i + 2] for i in range(0, 8, 2))
        before = [(t, t.clone(), t._version) for t in tensors]
        options = {"n_power_iterations": 2, "dims": [0, -2], "eps": 1e-3, "training": training, "dialect": "biggan"}
        options |= {"sigmas": sigmas, "implementation": None}
        a.requires_grad_()  # one of two
        if ahead:
            weights, vectors, found = spectral_norm_ahead([a, b], us, vs, **options)
            assert all(torch.equal(t, value) and t._version == version for t, value, version in before)
            if training:
                for kept, new in zip([us[0], vs[0], us[1], vs[1]], vectors, strict=True):
                    kept.copy_(new)
                for sigma, new in zip(sigmas, found, strict=True):
                    sigma.copy_(new)
        else:
            weights = GF.spectral_norm_group([a, b], us, vs, **options)
        (grad,) = torch.autograd.grad(weights[0].sin().sum(), a)
        return [*weights, grad, *us, *vs, *sigmas]

    expected = run(ahead=False)
    for python in (False, True):
        with native.python_gradients() if python else contextlib.nullcontext():
            assert all(torch.equal(a, b) for a, b in zip(run(ahead=True), expected, strict=True))


class Watch(TorchDispatchMode):
    """The operators of this library that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gankern":
            self.calls.append((func.__name__.removesuffix(".default"), args))
        return func(*args, **(kwargs or {}))


@needs_nodes
def test_a_gradient_that_the_running_backward_does_not_want_is_not_computed():
    x, b = tensors_of([(3, 4, 5), (4,)])
    y = GF.bias_act(x, b, activation="tanh")
    for wanted, sums in ((x, False), (b, True)):
        with Watch() as watch:
            torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        ((operator, arguments),) = watch.calls
        assert operator == "bias_act_backward" and arguments[-1] is sums
    with Watch() as watch:
        y.sum().backward(inputs=[x])
    assert watch.calls[0][1][-1] is False and b.grad is None


@needs_nodes
@pytest.mark.parametrize("name", [name for name in CALLS if name not in LINEAR])
def test_third_order_is_refused(name):
    call, shapes = CALLS[name]
    tensors = tensors_of(shapes)
    ys = outputs_of(call(*tensors))
    first = torch.autograd.grad(sum(y.sin().sum() for y in ys), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), tensors, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="exact to gradient order 2"):
        torch.autograd.grad(sum(s.sin().sum() for s in second if s is not None), tensors, allow_unused=True)


@needs_nodes
def test_what_is_kept_is_watched_and_freed():
    x, b = tensors_of([(3, 4), (4,)])
    y = GF.bias_act(x, b, activation="tanh")
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y = GF.bias_act(x, b, activation="tanh")
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = GF.bias_act(x, b, activation="tanh")
    x.grad = None
    y.sum().backward()
    assert len(packed) == 1
    assert torch.allclose(x.grad, 1 - y.detach() ** 2)


@needs_nodes
def test_an_exception_in_a_backward_leaves_nothing_behind():
    x, b = tensors_of([(3, 4), (4,)])

    def fail(t):
        raise ValueError("from a hook")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, fail):
        y = GF.bias_act(x, b, activation="tanh")
    for _ in range(2):  # a lock that were held would stop the second one
        with pytest.raises(ValueError, match="from a hook"):
            torch.autograd.grad(y.sum(), x, retain_graph=True)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (torch.autograd.grad(GF.bias_act(x, b).sum(), x), done.set()))
    thread.start()
    thread.join(20)
    assert done.is_set()


@needs_nodes
def test_threads():
    call, shapes = CALLS["bias_act, curved"]
    expected = orders(call, tensors_of(shapes))

    def work():
        for _ in range(50):
            for a, b in zip(orders(call, tensors_of(shapes)), expected, strict=True):
                assert a is b is None or torch.equal(a, b)

    in_threads(*[work] * 4)


@needs_nodes
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "bias_act: x is list"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "bias_act: x is int64"),
        ({"dim": 2}, ValueError, "bias_act: dim is 2"),
        ({"bias": torch.ones(2)}, ValueError, "bias_act: bias has shape"),
        ({"bias": torch.ones(3, dtype=torch.float64)}, ValueError, "bias_act: x and bias must share dtype"),
        ({"activation": "gelu"}, ValueError, "bias_act: activation is 'gelu'"),
        ({"gain": float("inf")}, ValueError, "bias_act: gain is inf"),
        ({"negative_slope": float("nan")}, ValueError, "bias_act: negative_slope is nan"),
        ({"clamp": 0.0}, ValueError, "bias_act: clamp is 0"),
        ({"implementation": "cuda"}, ValueError, "bias_act: "),
        ({"implementation": "nonsense"}, ValueError, "no implementation is called 'nonsense'"),
    ],
)
def test_errors_are_those_of_python(arguments, error, text):
    given = {"x": torch.ones(2, 3), "bias": torch.ones(3)} | arguments
    with pytest.raises(error) as ours:
        GF.bias_act(**given)
    with native.python_gradients(), pytest.raises(error) as theirs:
        GF.bias_act(**given)
    assert text in str(ours.value) and str(ours.value) == str(theirs.value)


@needs_nodes
def test_what_ran_is_on_record_and_a_wish_is_heard(monkeypatch):
    import gankern

    x = torch.randn(2, 3, requires_grad=True)
    assert by_nodes(GF.bias_act(x)) and last_implementation("bias_act") == "cpu"
    for context in (gankern.use_implementation("reference"), None):
        with context or contextlib.nullcontext():
            if context is None:
                monkeypatch.setenv("GANKERN_IMPLEMENTATION", "reference")
            assert not by_nodes(GF.bias_act(x, activation="tanh"))
            assert last_implementation("bias_act") == "reference"
            assert by_nodes(GF.bias_act(x, implementation="cpu"))
            assert last_implementation("bias_act") == "cpu"


@needs_nodes
def test_compiled():
    x, b = tensors_of([(3, 4), (4,)], torch.float32)
    compiled = torch.compile(lambda x, b: GF.bias_act(x, b, activation="tanh"), fullgraph=True, backend="aot_eager")
    for mine, plain in zip(
        torch.autograd.grad(compiled(x, b).sum(), (x, b)),
        torch.autograd.grad(GF.bias_act(x, b, activation="tanh").sum(), (x, b)),
    ):
        assert torch.equal(mine, plain)


# ---- which calls they take ------------------------------------------------------------------------------------------


def _maps(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _affine(**more):
    """Options of the normalisations, each beside x of [3, 4, 2, 2]."""
    return {
        "activation": [None, "linear", "relu", "leaky_relu"],
        "negative_slope": [0.1, 0, 1],
        "eps": [1e-3, 0],
        "implementation": [None, "cpu"],
        **more,
    }


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _both(*shape):
    """Affine values of x's dtype, and of the wider one."""
    return [lambda d, to=to: {name: _maps(to(d), *shape) for name in ("weight", "bias")} for to in (_same, _wide)]


def _running(**more):
    return [
        lambda d, to=to: {
            "running_mean": torch.zeros(4, dtype=to(d)),
            "running_var": torch.ones(4, dtype=to(d)),
            **more,
        }
        for to in (_same, _wide)
    ]


def _same(dtype):
    return dtype


# Of each function: its tensors for a dtype, and for each option (or several at once, as a dictionary) the values that
# people give it, or what makes them for a dtype; each is tried beside the others' defaults.
TAKEN = {
    "bias_act": (
        lambda d: (_maps(d, 3, 4, 2, 2), _maps(d, 4)),
        {
            "activation": [None, *GF.ACTIVATIONS],
            "dim": [1, -3],
            "gain": [2, 0.5],
            "clamp": [None, 1, 0.5],
            "negative_slope": [0, 1],
            "implementation": [None, "auto", "cpu"],
        },
    ),
    "relu": (lambda d: (_maps(d, 3, 4),), {"inplace": [True, False]}),
    "leaky_relu": (lambda d: (_maps(d, 3, 4),), {"inplace": [True, False], "negative_slope": [0.2, 0, 1]}),
    "pixel_norm": (lambda d: (_maps(d, 3, 4, 2, 2),), {"dim": [1, -3], "eps": [1e-6, 0], "implementation": ["cpu"]}),
    "bias_act_pixel_norm": (
        lambda d: (_maps(d, 3, 4, 2, 2), _maps(d, 4)),
        {
            "activation": [None, "linear", "relu", "leaky_relu"],
            "negative_slope": [0.1, 0],
            "gain": [2],
            "dim": [1, -3],
            "bias": [None],
        },
    ),
    "minibatch_stddev": (
        lambda d: (_maps(d, 4, 4, 2, 2),),
        {
            "group_size": [2, 4, 8],
            "num_channels": [1, 2],
            "layout": ["strided", "contiguous"],
            "unbiased": [True],
            "on_indivisible": ["raise", "largest_divisor", "whole_batch"],
        },
    ),
    "batch_norm_act": (
        lambda d: (_maps(d, 3, 4, 2, 2),),
        _affine(
            momentum=[0, 1, 0.3],
            affine=_both(4) + _both(3, 4),
            running=[
                {"running_mean": None, "running_var": None},
                *_running(training=True),
                *_running(training=False),
            ],
        ),
    ),
    "group_norm_act": (lambda d: (_maps(d, 3, 4, 2, 2), 2), _affine(affine=_both(4) + _both(3, 4))),
    "instance_norm_act": (
        lambda d: (_maps(d, 3, 4, 2, 2),),
        _affine(
            affine=_both(4) + _both(3, 4),
            running=_running(),
        ),
    ),
    "virtual_batch_norm": (
        lambda d: (_maps(d, 3, 4, 2, 2), _maps(_wide(d), 4), _maps(_wide(d), 4).square() + 1, None),
        _affine(ref_count=[4, 2.5], affine=_both(4)),
    ),
    "virtual_batch_norm_statistics": (lambda d: (_maps(d, 3, 4, 2),), {"implementation": ["cpu"]}),
    "l1_similarity": (
        lambda d: (_maps(d, 4, 2, 3),),
        {"include_self": [True, False], "other": [None, lambda d: _maps(d, 3, 2, 3)]},
    ),
    "minibatch_discrimination": (
        lambda d: (_maps(d, 4, 3), _maps(d, 3, 2, 2)),
        {"include_self": [True], "reduction": ["sum", "mean"]},
    ),
    "gradient_penalty": (lambda d: (_maps(d, 3, 4),), {"target": [0, 1, 1.5], "one_sided": [True]}),
    "upfirdn2d": (
        lambda d: (_maps(d, 2, 3, 4, 4), _maps(_wide(d), 2, 3)),
        {"up": [2, (2, 1), [1, 2]], "down": [2, (1, 2)], "padding": [1, (1, 2), [1, 0, 2, 1]], "gain": [2]},
    ),
    "upsample2d": (lambda d: (_maps(d, 2, 3, 4, 4), _maps(_wide(d), 4)), {"up": [2, (2, 1)], "gain": [2]}),
    "downsample2d": (lambda d: (_maps(d, 2, 3, 4, 4), _maps(_wide(d), 4)), {"down": [2, (2, 1)]}),
    "filter2d": (lambda d: (_maps(d, 2, 3, 4, 4), _maps(_wide(d), 3)), {"flip_filter": [True]}),
    "spectral_norm": (
        lambda d: (_maps(d, 4, 3, 2), _maps(d, 4), _maps(d, 6)),
        {"training": [True, False], "n_power_iterations": [1, 3], "eps": [1e-6], "implementation": ["cpu"]},
    ),
    "conv2d": (
        lambda d: (_maps(d, 2, 4, 6, 6), _maps(d, 5, 4, 3, 3), _maps(d, 5)),
        {
            "bias": [None],
            "padding": [1, (1, 1), [1, 2], (1,), "same", "valid"],
            "stride": [2, (1, 2), [2]],
            "dilation": [2, (1, 2)],
        },
    ),
    "conv_transpose2d": (
        lambda d: (_maps(d, 2, 5, 4, 4), _maps(d, 5, 4, 3, 3), _maps(d, 4)),
        {"bias": [None], "padding": [1, (1, 0), [1, 1]], "stride": [2, [2, 1]], "dilation": [2]},
    ),
    "upsample_conv2d": (
        lambda d: (_maps(d, 2, 16, 8, 8), _maps(d, 16, 16, 3, 3), _maps(d, 16)),
        {"bias": [None], "weight_scale": [0.5, 2]},
    ),
    "conv2d_downsample": (
        lambda d: (_maps(d, 2, 16, 8, 8), _maps(d, 16, 16, 3, 3), _maps(d, 16)),
        {"bias": [None], "weight_scale": [0.5, 2]},
    ),
}


def calls_of(name, dtype):
    """(arguments by name, what is special about them) of each set of options."""
    make, options = TAKEN[name]
    names = list(inspect.signature(getattr(GF, name)).parameters)
    for option, values in [("nothing", [{}]), *options.items()]:
        for value in values:
            given = dict(zip(names, make(dtype)))
            if name == "batch_norm_act":
                given |= {"running_mean": None, "running_var": None, "training": True}
            value = value(dtype) if callable(value) else value
            given |= value if isinstance(value, dict) else {option: value}
            yield given, f"{option}={value}"


@needs_nodes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_ordinary_calls_do_not_go_through_python(name, dtype, monkeypatch):
    tried, declined = [], []

    class Spy:
        def __getattr__(self, function):
            def call(*arguments):
                result = getattr(native.nodes, function)(*arguments)
                if result is NotImplemented:
                    declined.append(tried[-1])
                return result

            return call

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("gankern.functional.") and hasattr(module, "nodes"):
            monkeypatch.setattr(module, "nodes", Spy())
    for given, what in calls_of(name, dtype):
        tried.append(what)
        getattr(GF, name)(**given)
    assert len(tried) > 1 and declined == []


def test_every_function_is_among_them():
    """But for those that are no primitives: of several calls, or of a primitive under another name."""
    functions = {name for name, value in vars(GF).items() if inspect.isfunction(value) and name[0] != "_"}
    own = {name for name in functions if getattr(GF, name).__module__.startswith("gankern.functional.")}
    assert own - TAKEN.keys() == {
        "spectral_norm_group", "self_attention2d", "fir_upsample_conv2d", "fir_downsample_conv2d",
        "prelu", "upfirdn1d", "upsample1d", "downsample1d", "filter1d", "upfirdn3d", "upsample3d", "downsample3d",
        "filter3d",
    }  # fmt: skip


# ---- the library ------------------------------------------------------------------------------------------------

REPORT = """
import json, torch
import gankern.functional as GF
from gankern.cli.info import autograd_nodes
x = torch.ones(2, 3, requires_grad=True)
y = GF.bias_act(x, activation="tanh")
(g,) = torch.autograd.grad(y.sum(), x)
print(json.dumps([autograd_nodes(), "Gankern" in str(y), torch.allclose(g, 1 - y**2)]))
"""


def report(folder, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")} | environment
    process = subprocess.run([sys.executable, "-c", REPORT], cwd=folder, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@needs_nodes
def test_for_another_torch_they_are_not_loaded(tmp_path):
    package = tmp_path / "gankern"
    shutil.copytree(ROOT / "gankern", package, ignore=shutil.ignore_patterns("__pycache__"))
    name = native.nodes_library()
    facts, by_node, right = report(tmp_path)
    assert facts == name and by_node and right

    (package / name).rename(package / "libgankern_autograd-9.9.9.cpython-311.so")
    facts, by_node, right = report(tmp_path)
    assert "built for 9.9.9" in facts and torch.__version__ in facts and "reinstall" in facts
    assert not by_node and right

    (package / "libgankern_autograd-9.9.9.cpython-311.so").unlink()
    facts, by_node, right = report(tmp_path)
    assert "not built" in facts and not by_node and right

    (package / name).write_bytes(b"no library")
    facts, by_node, right = report(tmp_path)
    assert "do not load" in facts and not by_node and right


@needs_nodes
def test_switched_off_by_a_variable():
    facts, by_node, right = report(ROOT, GANKERN_AUTOGRAD_NODES="0", PYTHONPATH=str(ROOT))
    assert "GANKERN_AUTOGRAD_NODES=0" in facts and not by_node and right
