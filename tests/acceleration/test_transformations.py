"""Accelerated models under tracing, export, torch.func, forward mode, checkpointing, autocast and torch.compile: what the
original gives, and no other way."""

import contextlib
import copy
import functools
import inspect
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gankern
from gankern.acceleration import _attention, _chains, _norms

pytestmark = pytest.mark.usefixtures("onnx_functions_once")

X = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Pairs of every kind, met as functions and as modules; ``wrap`` is around its parts."""

    def __init__(self, norm=lambda layer: layer, wrap=lambda part, x: part(x)):
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.n = nn.BatchNorm2d(8)
        self.act = nn.LeakyReLU(0.2)
        self.b = norm(nn.Conv2d(8, 8, 3, padding=1))
        self.c = norm(nn.Conv2d(8, 4, 4, 2, 1))
        self.wrap = wrap

    def first(self, x):
        return self.act(self.n(self.a(F.interpolate(x, scale_factor=2))))

    def second(self, x):
        return self.c(F.relu(F.avg_pool2d(self.b(x), 2)))

    def forward(self, x, *, scale: float = 1.0):
        return self.wrap(self.second, self.wrap(self.first, x)) * scale


NORMS = {
    "no norm": lambda layer: layer,
    "parametrization": nn.utils.parametrizations.spectral_norm,
    "hook": nn.utils.spectral_norm,
}


def pair(norm="no norm", training=False, **options):
    """The original and its accelerated twin."""
    torch.manual_seed(0)
    net = Net(NORMS[norm], **options).double().train(training)
    twin = copy.deepcopy(net)
    assert gankern.accelerate(twin).replaced
    return net, twin


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def trained(net, x=X, steps=2):
    """Everything that some steps leave, penalty included."""
    results = []
    for _ in range(steps):
        x = x.detach().clone().requires_grad_()
        y = net(x)
        y.square().sum().backward()
        results += [y.detach(), x.grad]
    grads = {n: p.grad for n, p in net.named_parameters()}
    return results, grads, {n: b.clone() for n, b in net.named_buffers()}


def weights(net):
    return {n: p.detach() for n, p in net.named_parameters()}, {n: b.clone() for n, b in net.named_buffers()}


# ---- each returns what a network gives ------------------------------------------------------------------------------

GIVES = []


def gives(function):
    GIVES.append(function)
    return function


@gives
def traced(net):
    return torch.jit.trace(net, X)(X)


@gives
def exported(net):
    program = torch.export.export(net, (X,))
    assert not [node for node in program.graph.nodes if "gankern" in str(node.target)]
    return program.module()(X)


@gives
def exported_with_a_batch(net):
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    return torch.export.export(net, (X,), dynamic_shapes=shapes).module()(X[:2])


@gives
def in_onnxruntime(net):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = copy.deepcopy(net).float()
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.onnx.export(net, (X.float(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": X[:2].float().numpy()})
    return torch.from_numpy(y)


@gives
def mapped(net):
    return torch.func.vmap(net)(torch.stack([X, 2 * X]))


@gives
def per_sample(net):
    state, buffers = weights(net)

    def loss(state, x):
        return functional_call(net, (state, buffers), (x[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(state, X)


@gives
def ensemble(net):
    other = copy.deepcopy(net)
    for p in other.parameters():
        p.data.mul_(1.5)
    state = stack_module_state([net, other])
    return torch.func.vmap(lambda *state: functional_call(net, state, (X,)))(*state)


@gives
def reverse(net):
    return torch.func.jacrev(lambda x: net(x).sum((1, 2, 3)))(X)


@gives
def pushed(net):
    return torch.func.jvp(net, (X,), (X.cos(),))


@gives
def dual(net):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(X, X.cos()))).tangent


@gives
def inference(net):
    with torch.inference_mode():
        return net(X).clone()


@gives
def on_meta(net):
    y = net.to("meta")(X.to("meta"))
    return torch.empty(y.shape).fill_(y.device.type == "meta")


@gives
def scaled(net):
    return net(X, scale=2.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("given", GIVES, ids=lambda f: f.__name__)
def test_what_the_original_gives(given, norm):
    if given is ensemble and norm == "parametrization":
        pytest.skip("torch stacks modules of one class")
    net, twin = pair(norm)
    expected = given(net)
    close(given(twin), expected)
    close(twin(X) if given is not on_meta else (), net(X) if given is not on_meta else ())


def test_signatures_are_the_originals():
    net, twin = pair("hook")
    for name, module in net.named_modules():
        other = twin.get_submodule(name)
        assert inspect.signature(other.forward) == inspect.signature(module.forward), name


def test_scripting_is_refused_until_it_is_restored():
    _, twin = pair()
    for model in (twin, nn.Sequential(twin), copy.deepcopy(twin)):
        with pytest.raises(TypeError, match="torch.jit.script cannot compile gankern's accelerated model: .*restore"):
            torch.jit.script(model)
    layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    gankern.accelerate(layer)
    gankern.restore(layer)
    close(torch.jit.script(layer.double())(X), layer(X))


@pytest.mark.filterwarnings("ignore")
def test_a_program_in_a_file_needs_no_gankern(tmp_path):
    net, twin = pair("parametrization")
    torch.jit.trace(twin, X).save(str(tmp_path / "traced.pt"))
    torch.export.save(torch.export.export(twin, (X,)), tmp_path / "exported.pt2")
    torch.save((X, net(X).detach()), tmp_path / "tensors")
    code = (
        "import sys, torch\n"
        "x, y = torch.load('tensors')\n"
        "for run in (torch.jit.load('traced.pt'), torch.export.load('exported.pt2').module()):\n"
        "    torch.testing.assert_close(run(x), y, rtol=1e-9, atol=1e-9)\n"
        "assert 'gankern' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ---- checkpointing, and what else keeps what autograd saves -----------------------------------------------------


def not_reentrant(part, x):
    return checkpoint(part, x, use_reentrant=False)


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def selective(part, x):
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    kept = [torch.ops.aten.convolution.default, torch.ops.aten.mm.default]
    contexts = lambda: create_selective_checkpoint_contexts(kept)  # noqa: E731
    return checkpoint(part, x, use_reentrant=False, context_fn=contexts)


def saved_elsewhere(part, x):
    with torch.autograd.graph.save_on_cpu():
        return part(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wrap", [not_reentrant, reentrant, selective, saved_elsewhere], ids=lambda f: f.__name__)
def test_checkpointing(wrap, norm):
    net, twin = pair(norm, training=True, wrap=wrap)
    close(trained(twin), trained(net))


# ---- what waits keeps the state of the place where it was called ------------------------------------------------


class Switching(nn.Module):
    """Each half of a pair under another state; ``outer`` holds for the first, ``inner`` for the second."""

    def __init__(self, outer, inner):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.n = nn.BatchNorm2d(4)
        self.outer, self.inner = outer, inner

    def forward(self, x):
        with self.outer():
            h = F.interpolate(x, scale_factor=2)
        with self.inner():
            h = self.a(h)
        with self.outer():
            h = self.b(h.to(x.dtype))
        with self.inner():
            pooled = F.avg_pool2d(h, 2)
        with self.outer():
            normal = self.n(pooled.to(x.dtype))
        with self.inner():
            return h, pooled, F.relu(normal)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


STATES = {
    "nothing": contextlib.nullcontext,
    "autocast": bfloat16,
    "autocast off": no_autocast,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference mode off": lambda: torch.inference_mode(False),
    "reference": lambda: gankern.use_implementation("reference"),
    "precision": lambda: gankern.convolution_precision("medium"),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("around", ["nothing", "autocast", "no_grad"])
@pytest.mark.parametrize("inner", STATES)
@pytest.mark.parametrize("outer", ["nothing", "autocast", "autocast off", "no_grad", "enable_grad"])
def test_state_of_the_place(outer, inner, around):
    torch.manual_seed(0)
    net = Switching(STATES[outer], STATES[inner]).train()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    results = []
    for model in (net, twin):
        x = X.float().requires_grad_()
        with STATES[around]():
            y = model(x)
        assert all(type(t) is torch.Tensor for t in y)
        loss = sum(t.float().square().sum() for t in y)
        if loss.requires_grad:
            loss.backward()
        results.append((y, [t.requires_grad for t in y], x.grad, [p.grad for p in model.parameters()]))
    (found, found_needs, *found_grads), (expected, needs, *grads) = results[1], results[0]
    assert [t.dtype for t in found] == [t.dtype for t in expected] and found_needs == needs
    loose = {"rtol": 2e-2, "atol": 2e-2} if torch.bfloat16 in [t.dtype for t in expected] else {}
    loose = loose or {"rtol": 1e-4, "atol": 1e-4}
    if "autocast" in (outer, inner, around):
        loose = {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(found, expected, **loose)
    for a, b in zip([found_grads[0], *found_grads[1]], [grads[0], *grads[1]]):
        assert (a is None) == (b is None)
        if a is not None and "autocast" not in (outer, inner, around):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_gradients_inside_a_forward_without():
    """Inference mode and no_grad around a network that differentiates inside."""

    class Inside(Net):
        def forward(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                x = x.clone().requires_grad_()
                (grad,) = torch.autograd.grad(super().forward(x).sum(), [x])
            return grad

    torch.manual_seed(0)
    net = Inside(NORMS["hook"]).double()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(twin(X.clone()), net(X.clone()))


@pytest.mark.parametrize("norm", ["hook", "parametrization"])
def test_grad_mode_inside_of_inference_mode(norm):
    """As where a forward sets it by its own mode."""

    class Sets(Net):
        def forward(self, x):
            with torch.set_grad_enabled(self.training):
                return super().forward(x)

    torch.manual_seed(0)
    net = Sets(NORMS[norm]).double()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    for _ in range(2):
        with torch.inference_mode():
            y, right = twin(X.clone()), net(X.clone())
            assert not y.requires_grad
            close(y, right)
    close(twin(X.clone()), net(X.clone()))


def test_a_transform_inside_a_forward():
    class Inside(Net):
        def forward(self, x):
            h = F.interpolate(x, scale_factor=2)
            mapped = torch.func.vmap(lambda row: F.relu(self.a(row[None])))(h)
            return mapped.sum() + F.avg_pool2d(self.b(self.a(h)), 2).sum()

    torch.manual_seed(0)
    net = Inside().double()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    close(trained(twin), trained(net))


# ---- torch.compile ----------------------------------------------------------------------------------------------


class Graphs:
    """A backend that counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def driven(net):
    """Training, evaluation and no_grad, with batches of three sizes."""
    found = []
    for batch in (3, 5, 2):
        x = torch.cat([X, X.sin()])[:batch]
        net.train()
        y = net(x)
        y.square().sum().backward()
        found.append(y.detach())
        net.eval()
        found.append(net(x).detach())
        with torch.no_grad():
            found.append(net(x))
    return found, [p.grad for p in net.parameters()]


def whole(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Upsample(scale_factor=2), Net(norm), nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(2))
    return net.double()


def replaced(net, index, part):
    net[index] = part
    return net


ORDERS = {
    "accelerate, compile": lambda net, backend: gankern.accelerate(net) and torch.compile(net, backend=backend),
    "accelerate, .compile()": lambda net, backend: (gankern.accelerate(net), net.compile(backend=backend), net)[-1],
    "part compiled, accelerate": lambda net, backend: (
        replaced(net, 1, torch.compile(net[1], backend=backend)),
        gankern.accelerate(net),
        net,
    )[-1],
    "accelerate, part compiled": lambda net, backend: (
        gankern.accelerate(net),
        replaced(net, 1, torch.compile(net[1], backend=backend)),
    )[-1],
    "part .compile(), accelerate": lambda net, backend: (
        net[1].compile(backend=backend),
        gankern.accelerate(net),
        net,
    )[-1],
    "accelerate part, compile": lambda net, backend: (
        gankern.accelerate(net[1]),
        torch.compile(net, backend=backend),
    )[-1],
    "compile, accelerate part": lambda net, backend: (
        torch.compile(net, backend=backend),
        gankern.accelerate(net[1]),
    )[0],
}


@functools.cache
def by_itself():
    """What the original gives, and in how many graphs."""
    net = whole(NORMS["parametrization"])
    torch._dynamo.reset()
    graphs = Graphs()
    driven(torch.compile(copy.deepcopy(net), backend=graphs))
    return driven(net), graphs.count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ORDERS)
def test_compiled_in_any_order(order):
    """The numbers of the original, in no more graphs than it takes by itself."""
    expected, count = by_itself()
    torch._dynamo.reset()
    ours = Graphs()
    close(driven(ORDERS[order](whole(NORMS["parametrization"]), ours)), expected)
    assert 0 < ours.count <= count


class Helped(Net):
    """Its forward calls a function that was compiled."""

    def forward(self, x):
        return self.second(helper(F.interpolate(self.first(x), scale_factor=2)))


helper = torch.compile(lambda x: x.sin() * 2, backend="eager")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_inside():
    torch.manual_seed(0)
    net = Helped().double()
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)
    close(trained(twin), trained(net))


def test_a_fresh_process_compiles_more_than_once(tmp_path):
    code = (
        "import copy, torch, gankern\n"
        "from torch import nn\n"
        "torch.manual_seed(0)\n"
        "net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2))\n"
        "for _ in range(2):\n"
        "    twin = copy.deepcopy(net)\n"
        "    gankern.accelerate(twin)\n"
        "    run = torch.compile(twin, backend='eager')\n"
        "    for size, mode in ((2, True), (2, False), (3, True), (5, False)):\n"
        "        x = torch.randn(size, 3, 8, 8)\n"
        "        torch.testing.assert_close(run.train(mode)(x), copy.deepcopy(net).train(mode)(x))\n"
        "        with torch.no_grad():\n"
        "            run(x)\n"
        "        twin.load_state_dict(net.state_dict())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


THIRD = {
    "batch norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh()),
    "batch norm and relu": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
    "batch norm and leaky relu": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True), nn.Tanh()),
    "without affine values": lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Tanh()),
    "without statistics": lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh()),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
    "instance norm and relu": lambda: nn.Sequential(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Tanh()
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", THIRD)
def test_third_derivatives(name, training):
    torch.manual_seed(0)
    net = THIRD[name]().double().train(training)
    twin = copy.deepcopy(net)
    gankern.accelerate(twin)

    def derivatives(model):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * X.cos()).sum(), x, create_graph=True)
        # A penalty on the second one: by the input and the parameters.
        third = torch.autograd.grad(second.square().sum(), [x, *model.parameters()], allow_unused=True)
        return first, second, [torch.zeros(()) if g is None else g for g in third], list(model.buffers())

    for found, expected in zip(derivatives(twin), derivatives(net)):
        found, expected = (
            [g if g.any() else torch.zeros((), dtype=g.dtype) for g in gs] if isinstance(gs, list) else gs
            for gs in (found, expected)
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, check_dtype=False)


# ---- operations that do not announce themselves --------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Above(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        result = F.relu(x, inplace=True)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Itself(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class WithFunctions(nn.Module):
    """Each value that may wait goes to a Function, and to the second half of its pair besides where ``also``."""

    def __init__(self, function, also):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3)
        self.norm, self.function, self.also = nn.BatchNorm2d(3), function, also

    def after(self, value, second):
        kept = second(value) if self.also else 0
        return second(self.function.apply(value)) + kept

    def forward(self, x):
        x = self.after(self.norm(self.first(x)), lambda y: F.leaky_relu(y, 0.2))
        x = self.after(self.second(x), lambda y: F.avg_pool2d(y, 2))
        x = self.after(F.interpolate(x, scale_factor=2.0), lambda y: F.conv2d(y, self.second.weight, padding=1))
        x = self.after(F.pad(x, (1, 1, 1, 1), "reflect"), self.third)
        maps = x.flatten(2)
        scores = torch.bmm(maps.mT, maps)  # of one tensor by itself
        x = self.after(scores, lambda y: torch.softmax(y, -1)) @ maps.mT
        return self.after(x.pow(2), lambda y: torch.rsqrt(y.mean(1, keepdim=True) + 1e-8))


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("function", [Twice, Above, Squared, Itself])
@pytest.mark.parametrize("training", [True, False])
def test_functions_of_ones_own(function, also, training, double, monkeypatch):
    """A value that waits may be written to, saved and returned by a Function, and differentiated twice through it."""
    monkeypatch.setattr(_chains, "FROM", dict.fromkeys(_chains.FROM, 0))
    monkeypatch.setattr(_attention, "FROM", ((0, 1000),))
    torch.manual_seed(0)
    before = WithFunctions(function, also and function not in (Twice, Above)).train(training)
    after = copy.deepcopy(before)
    assert gankern.accelerate(after).replaced
    for step in range(3):  # the first one runs each half by itself
        found = []
        for net in (before, after):
            torch.manual_seed(step)
            net.zero_grad()
            x = torch.randn(2, 2, 6, 6).requires_grad_()
            y = net(x)
            (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            grad.square().sum().backward()
            found.append([y, grad, x.grad, *(p.grad for p in net.parameters())])
        largest = max(a.abs().max().item() for a in found[0])
        for a, b in zip(*found):
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12 * largest)


def test_what_waits_is_not_overwritten_before_a_functions_backward(double):
    net = WithFunctions(Itself, False)
    gankern.accelerate(net)
    x = torch.randn(2, 2, 6, 6)
    net(x)
    y = net(x)
    with torch.no_grad():
        net.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Louder(TorchFunctionMode):
    """Somebody's mode that changes what a function computes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 1.5 if func in (F.relu, torch.relu, torch.conv2d, F.conv2d) else result


@pytest.mark.parametrize("inside", [False, True])
def test_somebodys_function_mode_sees_the_functions(inside, double):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act, self.pool = nn.Conv2d(2, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), None

        def forward(self, x):
            with Louder() if inside else contextlib.nullcontext():
                return F.avg_pool2d(self.conv(x), 2), self.act(self.norm(x.repeat(1, 2, 1, 1)[:, :3]))

    before = Net()
    after = copy.deepcopy(before)
    gankern.accelerate(after)
    for _ in range(3):
        x = torch.randn(2, 2, 4, 4)
        with contextlib.nullcontext() if inside else Louder():
            torch.testing.assert_close(after(x), before(x), rtol=1e-12, atol=1e-12)


# ---- tensors of somebody's class --------------------------------------------------------------------------------


class Labelled(torch.Tensor):
    """Keeps its class, as most do."""


class Counted(torch.Tensor):
    """Has a word in torch's functions: what a convolution makes is twice as much, and none goes unseen."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func in (F.conv2d, F.conv_transpose2d, F.conv1d) else result


class OwnCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = F.avg_pool2d(F.leaky_relu(self.conv(F.interpolate(x, scale_factor=2)), 0.2), 2)
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


FOREIGN = {
    "convolution, mean": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2), nn.LeakyReLU(0.2)),
    "upsampling, batch norm": lambda: nn.Sequential(
        nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
    ),
    "transposed, instance norm": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.InstanceNorm2d(4), nn.PReLU()
    ),
    "padding, group norm": lambda: nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(True)
    ),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)),
    "functions": OwnCalls,
}


@pytest.mark.parametrize("kind", [Labelled, Counted])
@pytest.mark.parametrize("of", ["input", "weights"])
@pytest.mark.parametrize("name", FOREIGN)
def test_tensors_of_somebodys_class_keep_it(name, of, kind, monkeypatch):
    """And what it makes of torch's functions."""
    monkeypatch.setattr(_norms, "LARGE", 1)
    before, x = FOREIGN[name]().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    after = copy.deepcopy(before)
    gankern.accelerate(after)
    for _ in range(5):
        before(x), after(x.clone().requires_grad_())
    found = []
    for net in (before, after):
        if of == "weights":
            for module in net.modules():
                for key, p in module._parameters.items():
                    if p is not None:
                        module._parameters[key] = nn.Parameter(p.detach().as_subclass(kind))
        given = x.clone().requires_grad_()
        Counted.seen.clear()
        y = net(given.as_subclass(kind) if of == "input" else given)
        (gradient,) = torch.autograd.grad(y.square().sum(), given)
        found.append((type(y), {n for n in Counted.seen if n in F.__dict__}, y.as_subclass(torch.Tensor), gradient))
    assert found[0][:2] == found[1][:2] and found[1][0] is kind
    for a, b in zip(found[0][2:], found[1][2:]):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor), rtol=1e-9, atol=1e-11)


def test_what_is_no_tensor_is_torchs_error():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    gankern.accelerate(net)
    for wrong in (None, "image", 3):
        with pytest.raises(TypeError, match="conv2d"):
            net(wrong)
