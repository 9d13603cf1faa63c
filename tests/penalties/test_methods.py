"""Which method "auto" takes where the host's time is what a step costs: on a GPU, outside of graphs."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import gankern.nn as gnn
from gankern import penalties
from gankern.core import devices, native
from gankern.core.torch_internals import graph_of, modules_of
from gankern.measure import device as measured
from gankern.penalties import _common


class OnGPU:
    """Stands for samples on a device that is not here."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, values):
        self.values = values

    def numel(self):
        return self.values


class Once(Function):
    """Has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 1


def test_what_a_device_s_file_says(monkeypatch):
    monkeypatch.setattr(devices, "gains_from", lambda what, device: {"tangent form": 1000}[what])
    few, many = OnGPU(999), OnGPU(1000)
    assert devices.host_decides(devices.TANGENT, few) and not devices.host_decides(devices.TANGENT, many)
    with devices.to_be_replayed():
        with devices.to_be_replayed():
            assert not devices.host_decides(devices.TANGENT, few)
        assert not devices.host_decides(devices.TANGENT, few)
    assert devices.host_decides(devices.TANGENT, few)
    assert not devices.host_decides(devices.TANGENT, torch.zeros(3))  # thresholds of the CPU are known


def test_without_a_file_the_host_decides_on_every_gpu():
    assert devices.host_decides(devices.TANGENT, OnGPU(10**12))


@pytest.mark.parametrize("host_decides", [False, True])
def test_auto_is_double_backward_where_the_host_decides(monkeypatch, host_decides):
    """The same penalty and gradients, by the method that is asked for."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(2, 4, 3), gnn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1)).double()
    real, fake = torch.randn(2, 5, 2, 4, 4, dtype=torch.float64)
    alpha = torch.rand(5, dtype=torch.float64)
    asked, tangents = [], []
    by_tangents = _common.tangent.penalty_gradients
    monkeypatch.setattr(devices, "host_decides", lambda what, x: asked.append(what) or host_decides)
    monkeypatch.setattr(
        _common.tangent, "penalty_gradients", lambda *arguments: tangents.append(1) or by_tangents(*arguments)
    )
    found = []
    for method in ("auto", "double_backward", "tangent"):
        value = penalties.gradient_penalty(critic, real, fake, alpha=alpha, method=method)
        found.append(
            [value, *torch.autograd.grad(value, critic.parameters(), allow_unused=True, materialize_grads=True)]
        )
    assert asked == ["tangent form"]  # of "auto" alone
    assert len(tangents) == (1 if host_decides else 2)
    for a, b in zip(found[0], found[1]):
        torch.testing.assert_close(a, b)


def test_what_is_captured_is_known_to_be_replayed(monkeypatch):
    """Warm-up and capture take the same way: a kernel of another one would be launched first within the capture."""
    seen = []

    class Graph:
        def replay(self):
            pass

    class Context:
        def __init__(self, *arguments, **options):
            pass

        __enter__ = __exit__ = wait_stream = lambda self, *arguments: None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("graph", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Context)
    measured.graph_of(lambda: seen.append(devices.host_decides(devices.TANGENT, OnGPU(1))), "cuda")
    assert seen == [False] * 4 and devices.host_decides(devices.TANGENT, OnGPU(1))


@pytest.fixture(params=["C++", "Python"])
def walker(request, monkeypatch):
    """Who walks over graphs and networks."""
    if request.param == "Python":
        monkeypatch.setattr("gankern.core.torch_internals.nodes", native._Declines())
    elif native.NODES_MISSING:
        pytest.skip(native.NODES_MISSING)


@pytest.mark.usefixtures("walker")
def test_the_graph_of_outputs():
    """Its leaves, each once; the nodes that only raise; and the least number of its nodes."""
    a, b, c = (torch.randn(3, requires_grad=True) for _ in range(3))
    first = (a * 2).relu()
    y = first * b + a.exp()
    leaves, errors, least, _ = graph_of([y, first, torch.zeros(3)])
    assert sorted(map(id, leaves)) == sorted(map(id, (a, b))) and list(errors) == []
    assert least == first.grad_fn.next_functions[0][0]._sequence_nr()
    assert [*map(list, graph_of([])[:2]), graph_of([]).first] == [[], [], 2**64 - 1]
    (gradient,) = torch.autograd.grad((Once.apply(a) * b).sum(), a, create_graph=True)
    errors = graph_of([gradient]).errors
    assert [type(node).__name__ for node in errors] == ["Error"]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        errors[0](*[torch.zeros(())] * len(errors[0]._input_metadata))


@pytest.mark.usefixtures("walker")
def test_modules_of_some_kinds():
    shared = nn.BatchNorm1d(3)
    inner = nn.Sequential(shared, nn.ReLU(), shared)
    inner.absent = None
    inner.register_module("nothing", None)
    net = nn.ModuleDict({"inner": inner, "dropout": nn.Dropout()})
    net.around = net  # within itself, as some wrappers are
    found = modules_of(net, nn.modules.batchnorm._BatchNorm, nn.Sequential)
    assert sorted(map(id, found)) == sorted(map(id, (shared, inner)))
    assert list(modules_of(net, nn.ModuleDict)) == [net]
    assert list(modules_of(net, nn.Conv2d)) == []


@pytest.mark.parametrize("method", ["auto", "tangent", "double_backward"])
@pytest.mark.parametrize("of", ["sample", "weights"])
def test_there_is_no_forward_mode(of, method):
    """A tangent that got lost would be a derivative of zero. A level without tangents is nothing."""
    critic = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    x = torch.randn(4, 5)
    expected = penalties.r1_penalty(critic, x)

    def run(function, sample):
        return penalties.r1_penalty(function, sample, method=method)

    with torch.autograd.forward_ad.dual_level():
        make_dual = torch.autograd.forward_ad.make_dual
        duals = {name: make_dual(p.detach(), torch.ones_like(p)) for name, p in critic.named_parameters()}
        sample = make_dual(x, torch.ones_like(x)) if of == "sample" else x
        function = critic if of == "sample" else lambda x: torch.func.functional_call(critic, duals, (x,))
        error, says = (ValueError, "forward-mode") if method == "tangent" else (NotImplementedError, "forward mode")
        with pytest.raises(error, match=f"^r1_penalty: .*{says}"):
            run(function, sample)
        if method != "tangent":
            torch.testing.assert_close(run(critic, x), expected)


UNDER = {
    "grad": lambda loss, w: torch.func.grad(loss)(w),
    "gradients of single samples": lambda loss, w: torch.func.vmap(torch.func.grad(loss), 0)(
        {name: x.expand(2, *x.shape) for name, x in w.items()}
    ),
    "jvp": lambda loss, w: torch.func.jvp(loss, (w,), (w,)),
}
PENALTIES = {
    "gradient_penalty": lambda f, x: penalties.gradient_penalty(f, x, -x),
    "r1_penalty": lambda f, x: penalties.r1_penalty(f, x, method="tangent"),
    "dragan": penalties.dragan,
    "path_length": penalties.path_length,
}


@pytest.mark.parametrize("under", UNDER)
@pytest.mark.parametrize("name", PENALTIES)
def test_transformations_of_functions_are_refused_by_name(name, under):
    """torch's own word would be of Tensor.requires_grad_(), which nobody called."""
    critic, x = nn.Linear(5, 1), torch.randn(4, 5)
    weights = {name: p.detach() for name, p in critic.named_parameters()}

    def loss(w):
        return PENALTIES[name](lambda s: torch.func.functional_call(critic, w, (s,)), x)

    with pytest.raises(
        RuntimeError, match=rf"^{name}: called inside a transformation of torch\.func .*torch\.func\.grad"
    ):
        UNDER[under](loss, weights)
