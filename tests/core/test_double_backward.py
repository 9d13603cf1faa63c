"""The switch for a cheap double backward of torch's own layers."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from common import needs_nodes
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import gankern
from gankern.core import native
from gankern.core.double_backward import _CONSTANT_IN_INPUT, _CONVOLUTION, fast_double_backward
from gankern.core.torch_internals import graph_nodes

CONVOLUTIONS = {
    "1d": (F.conv1d, (2, 4, 9), (6, 4, 3), dict(stride=2, padding=1)),
    "2d": (F.conv2d, (2, 4, 7, 6), (6, 4, 3, 4), dict(stride=(2, 1), padding=(1, 2))),
    "2d, 1x1": (F.conv2d, (2, 4, 5, 5), (6, 4, 1, 1), {}),
    "2d, groups and dilation": (F.conv2d, (3, 4, 9, 8), (6, 2, 3, 3), dict(groups=2, dilation=(2, 1), padding=2)),
    "2d, depthwise": (F.conv2d, (2, 4, 6, 6), (4, 1, 3, 3), dict(groups=4, padding=1)),
    "2d, rows left over": (F.conv2d, (2, 3, 8, 9), (4, 3, 3, 3), dict(stride=3)),
    "2d, no samples": (F.conv2d, (0, 3, 8, 8), (4, 3, 3, 3), dict(padding=1)),
    "2d, one image without a batch": (F.conv2d, (3, 8, 8), (4, 3, 3, 3), dict(padding=1)),
    "3d": (F.conv3d, (2, 2, 5, 4, 5), (3, 2, 3, 2, 3), dict(stride=2, padding=1)),
    "1d, transposed": (F.conv_transpose1d, (2, 4, 5), (4, 3, 4), dict(stride=2, padding=1)),
    "2d, transposed": (F.conv_transpose2d, (2, 4, 5, 4), (4, 3, 4, 4), dict(stride=2, padding=1)),
    "2d, transposed, groups, output padding": (
        F.conv_transpose2d,
        (2, 4, 5, 4),
        (4, 3, 3, 3),
        dict(stride=3, padding=1, output_padding=(2, 1), groups=2, dilation=2),
    ),
    "3d, transposed": (F.conv_transpose3d, (1, 2, 3, 3, 2), (2, 3, 2, 2, 2), dict(stride=2)),
}


def near(ours, theirs, tolerance=1e-12):
    """Equal, where absent and zero are the same."""
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            assert a.dtype == b.dtype and a.shape == b.shape
            scale = b.abs().max().clamp_min(1e-30) if b.numel() else 1
            assert ((a - b).abs() <= tolerance * scale).all()


def second_order(function, inputs, needed, order=2):
    """Gradients of some of the gradients of `function`, and of their sums of squares once more for higher orders."""
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).requires_grad_()
    wanted = [x for x, n in zip(inputs, needed) if n]
    grads = torch.autograd.grad(out, wanted, grad, create_graph=True)
    for i in range(2, order + 1):
        loss = sum((g**2 * torch.linspace(1, 2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in grads)
        grads = torch.autograd.grad(loss, [grad, *inputs], create_graph=i < order, allow_unused=True)
        if i < order:
            grads = [g for g in grads if g is not None and g.requires_grad]
    return grads


NEEDED = [n for n in itertools.product((True, False), repeat=3) if any(n)]
# torch's third derivative of a convolution fails with output padding, and without samples it is absent here.
THIRD = [name for name in CONVOLUTIONS if "output padding" not in name and "no samples" not in name]


@pytest.mark.parametrize(
    ("name", "needed", "order"),
    [(name, needed, 2) for name in CONVOLUTIONS for needed in NEEDED] + [(name, NEEDED[0], 3) for name in THIRD],
)
def test_convolutions_equal_torch(name, needed, order):
    convolution, shape, weight_shape, options = CONVOLUTIONS[name]
    transposed = "transpose" in convolution.__name__
    channels = weight_shape[1] * options.get("groups", 1) if transposed else weight_shape[0]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True)
        for s in (shape, weight_shape, (channels,))
    ]
    theirs = second_order(lambda x, w, b: convolution(x, w, b, **options), inputs, needed, order)
    with fast_double_backward():
        ours = second_order(lambda x, w, b: convolution(x, w, b, **options), inputs, needed, order)
    near(ours, theirs)


@pytest.mark.parametrize(
    ("convolution", "shape", "weight_shape", "options"),
    [
        (F.conv1d, (1, 2, 5), (2, 2, 3), dict(stride=2, padding=1)),
        (F.conv2d, (1, 4, 4, 4), (4, 2, 2, 2), dict(groups=2, dilation=(2, 1))),
        (F.conv_transpose2d, (1, 2, 2, 3), (2, 1, 2, 2), dict(groups=2, stride=2, output_padding=1)),
    ],
)
def test_convolutions_gradgradcheck(convolution, shape, weight_shape, options):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(weight_shape, dtype=torch.float64, requires_grad=True)
    with fast_double_backward():
        assert torch.autograd.gradgradcheck(lambda x, w: convolution(x, w, **options), (x, w))


PIECEWISE_LINEAR = {
    "leaky_relu_backward": (lambda x: F.leaky_relu(x, 0.2), 2),
    "leaky_relu_backward, in place": (lambda x: F.leaky_relu_(x * 1, 0.2), 2),
    "threshold_backward": (F.relu, 2),
    "hardtanh_backward": (F.relu6, 2),
    "hardshrink_backward": (F.hardshrink, 2),
    "softshrink_backward": (F.softshrink, 2),
    "rrelu_with_noise_backward": (lambda x: F.rrelu(x, 0.1, 0.1, training=True), 2),
    "avg_pool2d_backward": (lambda x: F.avg_pool2d(x, 2), 2),
    "avg_pool3d_backward": (lambda x: F.avg_pool3d(x, 2), 3),
    "_adaptive_avg_pool2d_backward": (lambda x: F.adaptive_avg_pool2d(x, 3), 2),
    "_adaptive_avg_pool3d_backward": (lambda x: F.adaptive_avg_pool3d(x, 3), 3),
    "adaptive_max_pool2d_backward": (lambda x: F.adaptive_max_pool2d(x, 3), 2),
    "adaptive_max_pool3d_backward": (lambda x: F.adaptive_max_pool3d(x, 3), 3),
    "max_pool2d_with_indices_backward": (lambda x: F.max_pool2d(x, 2), 2),
    "max_pool3d_with_indices_backward": (lambda x: F.max_pool3d(x, 2), 3),
    "reflection_pad1d_backward": (lambda x: F.pad(x, (1, 2), "reflect"), 1),
    "reflection_pad2d_backward": (lambda x: F.pad(x, (1, 2, 2, 1), "reflect"), 2),
    "reflection_pad3d_backward": (lambda x: F.pad(x, (1, 2, 2, 1, 1, 1), "reflect"), 3),
    "replication_pad1d_backward": (lambda x: F.pad(x, (1, 2), "replicate"), 1),
    "replication_pad2d_backward": (lambda x: F.pad(x, (1, 2, 2, 1), "replicate"), 2),
    "replication_pad3d_backward": (lambda x: F.pad(x, (1, 2, 2, 1, 1, 1), "replicate"), 3),
}


def test_every_replacement_is_tested():
    assert {name.partition(",")[0] for name in PIECEWISE_LINEAR} == set(_CONSTANT_IN_INPUT)


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_piecewise_linear_operators_equal_torch(name):
    function, dims = PIECEWISE_LINEAR[name]
    x = torch.randn([2, 3, *[6] * dims], dtype=torch.float64, requires_grad=True)
    theirs = second_order(function, [x], [True], 3)
    with fast_double_backward():
        ours = second_order(function, [x], [True], 3)
        gradient = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
        # The square's own second derivative is there still.
        curvature = torch.autograd.grad(gradient.sum(), x)[0]
    near(ours, theirs)
    near(
        [curvature],
        torch.autograd.grad(torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0].sum(), x),
    )


def critic():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 1),
    )


def penalty_gradients(net, x):
    """The penalty as people write it by hand."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return torch.autograd.grad(penalty, list(net.parameters()), allow_unused=True)


class Convolutions(TorchDispatchMode):
    """Records (what is computed, kernel's shape, whether an operand is all zeros) of each convolution."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.calls.append(("forward", tuple(args[1].shape), not (args[0].any() and args[1].any())))
        elif func is torch.ops.aten.convolution_backward.default:
            mask = "".join(n for n, m in zip("xwb", args[10]) if m)
            self.calls.append((mask, tuple(args[2].shape), not all(a.any() for a in args[:3])))
        return func(*args, **(kwargs or {}))


@needs_nodes
def test_no_convolution_is_computed_that_is_not_needed():
    net, x = critic(), torch.randn(4, 3, 16, 16)
    with fast_double_backward(), Convolutions() as ours:
        penalty_gradients(net, x)
    weights = [tuple(m.weight.shape) for m in net if isinstance(m, nn.Conv2d)]
    # forward; data gradient, no weight gradient; tangent forward; weight gradient: four in all a layer.
    assert sorted(ours.calls) == sorted(
        (what, shape, False) for shape in weights for what in ("forward", "x", "forward", "w")
    )
    with Convolutions() as theirs:
        penalty_gradients(net, x)
    assert len(theirs.calls) > len(ours.calls)
    assert any(shape not in weights for _, shape, _ in theirs.calls), "torch no longer convolves with a feature map"
    assert any(zeros for _, _, zeros in theirs.calls), "torch no longer convolves zeros"


def test_a_hand_written_penalty_equals_torch():
    net, x = critic().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    theirs = penalty_gradients(net, x)
    with fast_double_backward():
        ours = penalty_gradients(net, x)
    near(ours, theirs)
    assert [g is None for g in ours] == [g is None for g in theirs]
    assert any(g is not None and not g.any() for g in ours), "no bias of a piecewise-linear critic has a part in it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    net, x = critic(), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", dtype):
        theirs = penalty_gradients(net, x)
        with fast_double_backward():
            ours = penalty_gradients(net, x)
    near(ours, theirs, 0.1)
    assert all(torch.isfinite(g).all() for g in ours if g is not None)


def dump():
    return {name: torch._C._dispatch_dump(f"aten::{name}") for name in (_CONVOLUTION, *_CONSTANT_IN_INPUT)}


@pytest.fixture
def way(way):
    """How torch's kernels are replaced. What C++ puts into torch's table stays there."""
    if way == "C++":
        with fast_double_backward():
            pass
    return way


def test_off_by_default_and_restored_exactly(way):
    if (
        way == "Python" and threading.active_count() > 1
    ):  # then torch's table is left for later: a test runner's threads
        test = f"{__file__}::test_off_by_default_and_restored_exactly"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", test, "-k", way], capture_output=True, text=True
        )
        assert "1 passed" in run.stdout, run.stdout
        return
    before = dump()
    assert not fast_double_backward.is_enabled()
    with fast_double_backward():
        assert fast_double_backward.is_enabled()
        assert (dump() != before) is (way == "Python")
        with fast_double_backward():
            pass
        assert fast_double_backward.is_enabled()
    assert not fast_double_backward.is_enabled()
    assert dump() == before
    with pytest.raises(ZeroDivisionError), fast_double_backward():
        raise ZeroDivisionError
    assert dump() == before
    with Convolutions() as calls:
        penalty_gradients(critic(), torch.randn(2, 3, 16, 16))
    assert len(calls.calls) > 12


def test_entries_say_nothing_when_they_come():
    """torch would warn that its kernels are overridden."""
    script = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, gankern\n"
        "with gankern.fast_double_backward(): pass\n"
        "torch.ones(2, requires_grad=True).relu().sum().backward()"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr


@needs_nodes
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_outside_of_blocks_the_entries_call_torch(name):
    """Whose graph has none of the nodes that stand for an absent derivative."""
    function, dims = PIECEWISE_LINEAR[name]
    x = torch.randn([2, 3, *[6] * dims], dtype=torch.float64, requires_grad=True)

    def gradient():
        (result,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return result, any("carry" in node.name().lower() for node in graph_nodes(result))

    theirs, replaced = gradient()
    assert not replaced
    with fast_double_backward():
        ours, replaced = gradient()
    assert replaced
    assert torch.equal(ours, theirs)


def test_enable_and_disable(way):
    before = dump()
    fast_double_backward.enable()
    fast_double_backward.enable()
    with fast_double_backward():
        fast_double_backward.disable()
        assert fast_double_backward.is_enabled()
    assert dump() == before
    fast_double_backward.disable()
    assert not fast_double_backward.is_enabled()

    @fast_double_backward()
    def inside():
        return fast_double_backward.is_enabled()

    assert inside() and inside() and not fast_double_backward.is_enabled()


def test_what_is_switched_off_in_python_is_off_in_cpp():
    fast_double_backward.enable()
    with native.python_gradients():
        fast_double_backward.disable()
    x = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(x.relu().square().sum(), x, create_graph=True)
    assert not any("carry" in node.name().lower() for node in graph_nodes(gradient))


def test_threads(way):
    before = dump()
    net, x = critic().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = penalty_gradients(net, x)
    failures = []

    def work(switched):
        try:
            for _ in range(20):
                if switched:
                    with fast_double_backward():
                        near(penalty_gradients(net, x), expected)
                else:
                    near(penalty_gradients(net, x), expected)
        except BaseException as error:
            failures.append(error)

    with fast_double_backward():
        threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(6)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not fast_double_backward.is_enabled()
    near(penalty_gradients(net, x), expected)
    with Convolutions() as calls:
        penalty_gradients(net, x)
    assert len(calls.calls) > 12, "the entries that wait for the other threads must do what torch does"
    with fast_double_backward():
        pass
    assert dump() == before


def test_func_transforms():
    net, x = critic().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def penalty(p):
        gradient = torch.func.grad(lambda x: torch.func.functional_call(net, p, (x,)).sum())(x)
        return gradient.square().sum()

    def gradients_of_samples(p):
        def one(x):
            return torch.func.functional_call(net, p, (x[None],)).sum()

        return torch.func.vmap(torch.func.grad(one))(x).square().sum()

    for function in (penalty, gradients_of_samples):
        theirs = torch.func.grad(function)(parameters)
        with fast_double_backward():
            ours = torch.func.grad(function)(parameters)
        near(ours.values(), theirs.values())


def test_forward_mode_over_reverse():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.LeakyReLU(0.2), nn.Conv1d(3, 2, 3)).double()
    x, v = torch.randn(2, 1, 2, 9, dtype=torch.float64)

    def gradient(x):
        return torch.func.grad(lambda x: net(x).square().sum())(x)

    theirs = torch.func.jvp(gradient, (x,), (v,))[1]
    with fast_double_backward():
        ours = torch.func.jvp(gradient, (x,), (v,))[1]
    near([ours], [theirs])


def test_duals_through_a_gradient(way):
    """Forward mode with torch.autograd.forward_ad, of all replacements."""
    functions = [*PIECEWISE_LINEAR.values(), (lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3).to(x)).square(), 2)]

    def tangents(function, x, v):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)
            (gradient,) = torch.autograd.grad(function(dual).square().sum(), dual, create_graph=True)
            (second,) = torch.autograd.grad(gradient.square().sum(), dual)
            return [forward_ad.unpack_dual(g).tangent.detach() for g in (gradient, second)]

    for function, dims in functions:
        x, v = torch.randn(2, 2, 3, *[6] * dims, dtype=torch.float64)
        x.requires_grad_()
        theirs = tangents(function, x, v)
        with fast_double_backward():
            ours = tangents(function, x, v)
        near(ours, theirs)


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_sparse_tensors_are_left_to_torch(way, layout):
    values = torch.tensor([3.0, -4.0, 5.0], dtype=torch.float64, requires_grad=True)

    def gradient():
        x = torch.sparse_coo_tensor([[0, 1, 1], [2, 0, 2]], values, (2, 3), check_invariants=True)
        x = x.coalesce() if layout == "sparse_coo" else x.to_sparse_csr()
        return torch.autograd.grad(x.relu().to_dense().sum(), values, create_graph=True)[0]

    theirs = gradient()
    with fast_double_backward():
        assert torch.equal(gradient(), theirs)


def test_a_gradient_can_be_written_to(way):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def second():
        results = [torch.ops.aten.threshold_backward(x * 2, x, 0.0)]
        results.append(torch.autograd.grad(x.relu().pow(3).sum(), x, create_graph=True)[0])
        for result in results:
            assert not result._is_view()
            result.mul_(3)[0] = 1
        return torch.autograd.grad(sum(r.square().sum() for r in results), x)

    theirs = second()
    with fast_double_backward():
        near(second(), theirs)


def test_compiled_models_train_the_same():
    net, x = critic(), torch.randn(2, 3, 16, 16)
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with fast_double_backward():
        torch.compile(net, backend="aot_eager", fullgraph=True)(x).sum().backward()
    near([p.grad for p in net.parameters()], expected, 1e-5)


def test_public_name():
    assert gankern.fast_double_backward is fast_double_backward
