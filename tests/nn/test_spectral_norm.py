"""gankern.nn.utils.spectral_norm in its forms, step by step beside torch's; and the group."""

import copy
import io
import pickle
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize, remove_spectral_norm
from torch.nn.utils import spectral_norm as torch_hook

import gankern
import gankern.nn.utils as U
from gankern.core import devices, native
from gankern.core.torch_internals import graph_nodes
from gankern.nn.utils import _by_torch, _group, _requests

FORMS = {
    "parametrization": (torch_parametrizations.spectral_norm, U.parametrizations.spectral_norm),
    "hook": (torch_hook, U.spectral_norm),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3), (1, 2, 5, 5, 5)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 4, 2, 1), (2, 3, 8, 8)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 3), (1, 2, 5, 5, 5)),
    "embedding": (lambda: nn.Embedding(10, 4), None),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), "bilinear"),
}


def batch(kind):
    if kind is None:
        return (torch.tensor([1, 3, 3, 9]),)
    if kind == "bilinear":
        return torch.randn(2, 3), torch.randn(2, 4)
    return (torch.randn(kind),)


def network(normalize):
    torch.manual_seed(0)
    return nn.Sequential(
        normalize(nn.Conv2d(3, 8, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        normalize(nn.ConvTranspose2d(8, 5, 4, 2, 1)),
        nn.Flatten(),
        normalize(nn.Linear(5 * 64, 1)),
    )


def steps(module, n=5, rate=1e-2):
    """Gradient steps with two forwards each; every number that a step makes."""
    torch.manual_seed(1)
    record = []
    for _ in range(n):
        real, fake = torch.randn(2, 2, 3, 8, 8)
        module.zero_grad()
        loss = module(real).sum() - module(fake).square().mean()
        loss.backward()
        record += [loss.detach(), *(p.grad.clone() for p in module.parameters())]
        with torch.no_grad():
            for p in module.parameters():
                p -= rate * p.grad
    return record + [x.clone() for x in module.state_dict().values()]


def close(ours, right):
    assert len(ours) == len(right)
    for a, b in zip(ours, right):
        # Relative to the largest value of a tensor: single entries of a gradient may cancel.
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_follows_torch(form, layer):
    make, kind = LAYERS[layer]
    modules = []
    for normalize in FORMS[form]:
        torch.manual_seed(0)
        modules.append(normalize(make()))
    right, ours = modules
    assert list(ours.state_dict()) == list(right.state_dict())
    for training in (True, True, False):
        x = batch(kind)
        outs = []
        for module in modules:
            module.train(training)
            module.zero_grad()
            out = module(*x)
            out.square().sum().backward()
            outs.append([out.detach(), *(p.grad for p in module.parameters()), *module.state_dict().values()])
        close(*reversed(outs))
    assert gankern.last_implementation("spectral_norm") == "cpu"


@pytest.mark.parametrize("form", FORMS)
def test_100_steps_checkpoints_both_ways_and_removal(form):
    theirs, ours = FORMS[form]
    a, b = network(theirs), network(ours)
    close(steps(b, 100, 1e-4), steps(a, 100, 1e-4))

    file = io.BytesIO()
    torch.save(b.state_dict(), file)
    file.seek(0)
    fresh = network(theirs)
    fresh.load_state_dict(torch.load(file))
    close(steps(fresh), steps(b))
    b.load_state_dict(a.state_dict())
    close(steps(b), steps(a))

    for module in (a, b):
        module.eval()
        if form == "hook":
            remove_spectral_norm(module[0])
        else:
            parametrize.remove_parametrizations(module[0], "weight")
    torch.testing.assert_close(b[0].weight, a[0].weight, rtol=1e-4, atol=1e-5)
    assert list(b.state_dict()) == list(a.state_dict())


@pytest.fixture(params=["where it is used", "ahead"])
def each_way(request, monkeypatch):
    """Each layer computed where it is used, as on the CPU, or all of them ahead, as on CUDA."""
    if request.param == "ahead":
        monkeypatch.setattr(_group, "_AHEAD_ON", {"cpu"})
    return request.param


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", [0, 1], ids=["torch's own layers", "gankern's layers"])
def test_group_follows_torch(form, which):
    right = network(FORMS[form][0])
    grouped = U.group_spectral_norm(network(FORMS[form][which]))
    copies = [grouped, copy.deepcopy(grouped)]
    if form == "hook":  # a parametrized module cannot be pickled whole, torch's neither
        copies.append(pickle.loads(pickle.dumps(grouped)))
    expected = steps(right, 10, 1e-3)
    for module in copies:
        close(steps(module, 10, 1e-3), expected)
    for module in (right, grouped):
        module.eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(grouped(x), right(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ahead", "expected"), [("cpu", 1), ("cuda", 3)])
def test_how_often_a_group_calls(ahead, expected, monkeypatch):
    monkeypatch.setattr(_group, "_AHEAD_ON", {ahead})
    grouped = U.group_spectral_norm(network(U.parametrizations.spectral_norm))
    with torch.profiler.profile() as profile:
        grouped(torch.randn(2, 3, 8, 8)).sum().backward()
    calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("gankern::")}
    assert calls == {"gankern::spectral_norm": expected, "gankern::spectral_norm_backward": expected}


class Twice(nn.Module):
    """A layer used twice in a forward, one that is skipped, and one with a frozen weight."""

    def __init__(self, normalize):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.skipped, self.frozen = (normalize(nn.Linear(4, 4)) for _ in range(3))
        for p in self.frozen.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.a(self.a(x)))


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("form", FORMS)
def test_layer_used_twice(form):
    right, ours = Twice(FORMS[form][0]), U.group_spectral_norm(Twice(FORMS[form][1]))
    for _ in range(3):
        x = torch.randn(5, 4)
        grads = []
        for module in (right, ours):
            module.zero_grad()
            out = module(x)
            out.sum().backward()
            grads.append([out, module.a.state_dict()[next(k for k in module.a.state_dict() if k.endswith("_u"))],
                          *(p.grad for p in module.a.parameters())])  # fmt: skip
            assert all(p.grad is None for p in module.frozen.parameters())
        close(*reversed(grads))
    # Outside of the group's forward the layers work alone.
    x = torch.randn(5, 4)
    torch.testing.assert_close(ours.a(x), right.a(x))


def _parameter(layer):
    return next(p for name, p in layer.named_parameters() if "bias" not in name)


class Writer:
    def by_method(self, weight):
        weight.data.mul_(-1.5)


WRITER = Writer()
writers = types.ModuleType("writers")  # as a file of somebody's own is
writers.by_function = lambda weight: WRITER.by_method(weight)


# Changes of what a layer's iteration starts from, and of how it iterates.
STATES = {
    "u written": lambda layer, u, v: getattr(layer, u).mul_(-0.5).add_(0.3),
    "v written": lambda layer, u, v: getattr(layer, v).fill_(0.4),
    "u replaced": lambda layer, u, v: setattr(layer, u, torch.full((4,), 0.5, dtype=torch.float64)),
    "u read": lambda layer, u, v: getattr(layer, v).copy_(getattr(layer, u).flip(0)),
}
UNSEEN = ("written through .data", "written as an array")  # by autograd
SETTINGS = {"more iterations": ("n_power_iterations", 3), "another eps": ("eps", 0.2)}


class Between(nn.Module):
    """Whose forward does something to a layer after another one has run: what a group computed ahead is not it."""

    def __init__(self, normalize, form, change):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (normalize(nn.Linear(4, 4)).double() for _ in range(2))
        self.form, self.change = form, change

    def forward(self, x):
        self.train()
        _parameter(self.b).requires_grad_(self.change != "unfrozen")
        y = self.a(x).tanh()
        if self.change in ("frozen", "unfrozen"):
            _parameter(self.b).requires_grad_(self.change == "unfrozen")
        elif self.change == "evaluated":
            self.b.eval()
        elif self.change == "written":
            with torch.no_grad():
                _parameter(self.b).mul_(-1.5)
        elif self.change == "written through .data":
            _parameter(self.b).data.mul_(-1.5)
        elif self.change == "written as an array":
            self.as_array()
        elif self.change == "swapped":
            torch.utils.swap_tensors(_parameter(self.b), nn.Parameter(_parameter(self.b).detach() * -1.5))
        elif self.change in STATES:
            normalizer = self.b.parametrizations.weight[0] if self.form == "parametrization" else self.b
            u, v = ("_u", "_v") if self.form == "parametrization" else ("weight_u", "weight_v")
            with torch.no_grad():
                STATES[self.change](normalizer, u, v)
        elif self.change in SETTINGS:
            hook = next((h for h in self.b._forward_pre_hooks.values() if hasattr(h, "n_power_iterations")), None)
            setattr(self.b.parametrizations.weight[0] if hook is None else hook, *SETTINGS[self.change])
        elif self.change == "replaced":
            twin = nn.Parameter(_parameter(self.b).detach().flip(0))
            if self.form == "hook":
                self.b.weight_orig = twin
            else:
                self.b.parametrizations.weight.original = twin
        return self.b(y)

    def as_array(self):
        array = _parameter(self.b).detach().numpy()
        array *= -1.5


class ByFunction(Between):
    """Whose own code names no way to write; the next three likewise."""

    def forward(self, x):
        y = self.a(x).tanh()
        writers.by_function(_parameter(self.b))
        return self.b(y)


class ByObject(Between):
    def forward(self, x):
        y = self.a(x).tanh()
        WRITER.by_method(_parameter(self.b))
        return self.b(y)


class ByAttribute(Between):
    def forward(self, x):
        y = self.a(x).tanh()
        self.writer.by_method(_parameter(self.b))
        return self.b(y)

    def __init__(self, *args):
        super().__init__(*args)
        self.writer = Writer()


class ByArray(Between):
    def forward(self, x):
        y = self.a(x).tanh()
        self.as_array()
        return self.b(y)


@pytest.mark.parametrize("kind", [ByFunction, ByObject, ByAttribute, ByArray])
@pytest.mark.parametrize("form", FORMS)
def test_writes_that_other_code_does(form, kind):
    """Accelerated and, where each layer is computed where it is used, grouped."""
    theirs, ours = FORMS[form]
    right, group = kind(theirs, form, ""), U.group_spectral_norm(kind(ours, form, ""))
    accelerated = kind(theirs, form, "")
    gankern.accelerate(accelerated)
    for module in (group, accelerated):
        module.load_state_dict(right.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(2):
        expected = right(x)
        close([group(x), accelerated(x)], [expected, expected])


def _write_before(layer, inputs):
    _parameter(layer).data.mul_(-1.5)


@pytest.mark.parametrize("form", FORMS)
def test_hooks_that_write_within_a_forward(form, each_way):
    theirs, ours = FORMS[form]
    right, net = Between(theirs, form, "nothing"), Between(theirs, form, "nothing")
    gankern.accelerate(net)
    compared = [net]
    if each_way != "ahead":  # to what is computed ahead nobody writes so
        compared.append(U.group_spectral_norm(Between(ours, form, "nothing")))
    for module in compared:
        module.load_state_dict(right.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    for step in range(3):
        expected = right(x)
        for module in compared:
            close([module(x)], [expected])
        if step == 0:
            for module in (right, *compared):
                module.b.register_forward_pre_hook(_write_before, prepend=True)


@pytest.mark.parametrize(
    "change",
    [
        "nothing",
        *UNSEEN,
        "swapped",
        "frozen",
        "unfrozen",
        "evaluated",
        "written",
        "replaced",
        *STATES,
        *SETTINGS,
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_layers_that_change_within_a_forward(form, change, each_way):
    theirs, ours = FORMS[form]
    accelerated = Between(theirs, form, change)
    gankern.accelerate(accelerated)
    right = Between(theirs, form, change)
    compared = [accelerated]
    group = U.group_spectral_norm(Between(ours, form, change))
    if each_way == "ahead" and change == "swapped":  # torch refuses it, for the weight is in a graph already
        with pytest.raises(RuntimeError, match="AccumulateGrad"):
            group(torch.randn(5, 4, dtype=torch.float64))
    elif each_way != "ahead" or change not in UNSEEN:
        compared.append(group)
    for module in compared:
        right.load_state_dict(module.state_dict())
        for _ in range(2):
            x = torch.randn(5, 4, dtype=torch.float64)
            results = []
            for each in (right, module):
                each.zero_grad()
                out = each(x)
                out.square().sum().backward()
                grads = [p.grad for p in each.parameters() if p.grad is not None]
                results.append([out.detach(), *(t.clone() for t in each.state_dict().values()), *grads])
            close(*reversed(results))
            assert _parameter(module.b).grad is None if change == "frozen" else _parameter(module.b).grad is not None


@pytest.mark.parametrize("python", [False, True], ids=["nodes", "python"])
def test_what_is_seen_of_a_layer(python, monkeypatch):
    if python:
        monkeypatch.setattr(_requests, "nodes", native._Declines())
    elif native.NODES_MISSING:
        pytest.skip(native.NODES_MISSING)
    weight, u, v = nn.Parameter(torch.randn(3, 4)), torch.randn(3), torch.randn(4)
    rules = "biggan", 1, 1e-12, True, None

    def seen(weight=weight, u=u, v=v, sigma=None):
        return _requests._seen(_requests.Request(rules, weight, u, v, 0, sigma))

    others = [seen(u=u.clone()), seen(v=None), seen(sigma=torch.ones(1)), seen(weight=weight.double())]
    with torch.no_grad():
        others.append(seen())
    with torch.inference_mode():
        others.append(seen())
    same = seen()
    others.append(seen(weight=weight.requires_grad_(False)))
    weight.requires_grad_()
    assert seen() == same
    u.mul_(2)
    others.append(seen())
    with torch.no_grad():
        weight.mul_(2)
    others.append(seen())
    assert same not in others and len({repr(facts) for facts in others}) == len(others)


@pytest.mark.usefixtures("each_way")
def test_evaluation_writes_to_no_buffer():
    for form in FORMS:
        group = U.group_spectral_norm(network(FORMS[form][1])).eval()
        before = [buffer._version for buffer in group.buffers()]
        group(torch.randn(2, 3, 8, 8))
        assert before and [buffer._version for buffer in group.buffers()] == before


@pytest.mark.usefixtures("each_way")
def test_failed_forward_leaves_nothing_behind():
    class Fails(Twice):
        def forward(self, x):
            raise KeyError("on purpose")

    module = U.group_spectral_norm(Fails(U.parametrizations.spectral_norm))
    with pytest.raises(KeyError):
        module(torch.randn(1, 4))
    assert module.a.parametrizations.weight[0]._prepared.value == []


@pytest.mark.usefixtures("each_way")
def test_cached_parametrizations():
    right = network(torch_parametrizations.spectral_norm)
    ours = U.group_spectral_norm(network(U.parametrizations.spectral_norm))
    x = torch.randn(2, 3, 8, 8)
    for module in (right, ours):
        with parametrize.cached():
            module(x), module(x)
    close(list(ours.state_dict().values()), list(right.state_dict().values()))


@pytest.mark.parametrize("form", FORMS)
def test_compiled(form):
    eager, compiled = (U.group_spectral_norm(network(FORMS[form][1])) for _ in range(2))
    # Generated code once: the operator is the same one for each form.
    runs = torch.compile(compiled, fullgraph=True, backend="inductor" if form == next(iter(FORMS)) else "aot_eager")
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        outs = []
        for module, call in ((eager, eager), (compiled, runs)):
            module.zero_grad()
            out = call(x)
            out.sum().backward()
            outs.append([out.detach(), *(p.grad for p in module.parameters()), *module.state_dict().values()])
        close(*outs)


@pytest.mark.usefixtures("each_way")
def test_moving_and_converting():
    module = U.group_spectral_norm(network(U.parametrizations.spectral_norm)).double()
    assert module(torch.randn(1, 3, 8, 8).double()).dtype == torch.float64
    module = module.to(torch.bfloat16)
    assert module(torch.randn(1, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
    module = module.float().to(memory_format=torch.channels_last)
    right = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(module(x), right(x))
    weight = module[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


# ---- the two copied forms -------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """The iteration of the wrapper class that many repositories hold, from its description."""

    def __init__(self, weight, u, v):
        super().__init__()
        self.w, self.u, self.v = weight, u, v

    def weight(self):
        m = self.w.flatten(1)
        self.v = m.detach().t() @ self.u
        self.v = self.v / (self.v.norm() + 1e-12)
        self.u = m.detach() @ self.v
        self.u = self.u / (self.u.norm() + 1e-12)
        return self.w / (self.u @ (m @ self.v))


def test_wrapper_dialect():
    layer = U.spectral_norm(nn.ConvTranspose2d(3, 4, 3), dialect="wrapper")  # rows are dim 0 here too
    assert sorted(layer.state_dict()) == ["bias", "weight_bar", "weight_u", "weight_v"]
    assert layer.weight_u.shape == (3,)
    right = Wrapped(layer.weight_bar, layer.weight_u.clone(), layer.weight_v.clone())
    for training in (True, False, True):
        layer.train(training)
        layer(torch.randn(1, 3, 4, 4))
        torch.testing.assert_close(layer.weight, right.weight())
        torch.testing.assert_close(layer.weight_u, right.u)  # evaluation iterates as well


def test_biggan_dialect():
    torch.manual_seed(0)
    layer = U.spectral_norm(nn.Conv2d(3, 4, 3), dialect="biggan", eps=1e-6)
    assert {k: tuple(x.shape) for k, x in layer.state_dict().items()} == {
        "weight": (4, 3, 3, 3), "bias": (4,), "u0": (1, 4), "sv0": (1,)}  # fmt: skip
    m, u = layer.weight_orig.detach().flatten(1), layer.u0.clone()
    for training in (True, False, False):
        layer.train(training)
        layer(torch.randn(1, 3, 4, 4))
        v = nn.functional.normalize(u @ m, eps=1e-6)
        new = nn.functional.normalize(v @ m.T, eps=1e-6)
        sigma = (new @ m @ v.T).squeeze()
        torch.testing.assert_close(layer.weight.flatten(1), m / sigma)
        if training:
            u = new
            torch.testing.assert_close(layer.sv0, sigma.view(1))
        torch.testing.assert_close(layer.u0, u)  # evaluation does not keep what it iterates
    other = U.spectral_norm(nn.Conv2d(3, 4, 3), dialect="biggan", eps=1e-6)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(other.eval()(x), layer.eval()(x))
    remove_spectral_norm(layer)
    assert sorted(layer.state_dict()) == ["bias", "weight"]


# ---- several processes ----------------------------------------------------------------------------------------


def _worker(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    module = U.group_spectral_norm(network(U.parametrizations.spectral_norm))
    wrapped = nn.parallel.DistributedDataParallel(module)
    torch.manual_seed(5)
    x = torch.randn(4, 3, 8, 8)[2 * rank : 2 * rank + 2]
    # One forward before a backward: DDP broadcasts buffers at each, which torch's spectral norm does not survive
    # either with two.
    wrapped(x).mean().backward()
    results[rank] = [p.grad.tolist() for p in module.parameters()], module[0].state_dict()
    dist.destroy_process_group()


def test_distributed_data_parallel():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, (port, results), nprocs=2)
        ranks = [results[0], results[1]]
    module = network(torch_parametrizations.spectral_norm)
    torch.manual_seed(5)
    module(torch.randn(4, 3, 8, 8)).mean().backward()
    for grads, _ in ranks:
        close([torch.tensor(g) for g in grads], [p.grad for p in module.parameters()])


# ---- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [U.spectral_norm, U.parametrizations.spectral_norm])
def test_bad_input(normalize):
    with pytest.raises(ValueError, match="LeakyReLU has no parameter 'weight'; its parameters are none"):
        normalize(nn.LeakyReLU())
    with pytest.raises(ValueError, match="no parameter 'wieght'; its parameters are weight, bias"):
        normalize(nn.Linear(2, 2), "wieght")
    for first in (U.spectral_norm, U.parametrizations.spectral_norm, torch_hook, torch_parametrizations.spectral_norm):
        with pytest.raises(ValueError, match="spectrally normalized already"):
            normalize(first(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="n_power_iterations is 0"):
        normalize(nn.Linear(2, 2), n_power_iterations=0)
    with pytest.raises(TypeError, match="n_power_iterations is 1.5; it must be an integer"):
        normalize(nn.Linear(2, 2), n_power_iterations=1.5)
    for eps in (-1, 0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"spectral_norm: eps is {eps}"):
            normalize(nn.Linear(2, 2), eps=eps)
    with pytest.raises(TypeError, match="eps is '1e-12'; it must be a number"):
        normalize(nn.Linear(2, 2), eps="1e-12")
    with pytest.raises(TypeError, match="dim is 0.5; it must be an integer"):
        normalize(nn.Linear(2, 2), dim=0.5)
    with pytest.raises(IndexError, match="dim is 7.* accepts -2 to 1"):
        normalize(nn.Linear(2, 2), dim=7)
    integers = nn.Module()
    integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)
    with pytest.raises(TypeError, match="'weight' is int32; accepted are"):
        normalize(integers)
    with pytest.raises(ValueError, match="not initialized yet"):
        normalize(nn.LazyLinear(3))
    with pytest.raises(RuntimeError, match=r"size mismatch.*\[5, 2\].*\[3, 2\]"):
        normalize(nn.Linear(2, 3)).load_state_dict(normalize(nn.Linear(2, 5)).state_dict())


def test_bad_groups_and_dialects():
    with pytest.raises(ValueError, match="Sequential has no spectrally normalised layer"):
        U.group_spectral_norm(nn.Sequential(nn.Linear(2, 2)))
    grouped = U.group_spectral_norm(network(U.spectral_norm))
    for module in (grouped, nn.Sequential(grouped)):
        with pytest.raises(ValueError, match="grouped already"):
            U.group_spectral_norm(module)
    with pytest.raises(ValueError, match="'torch'; accepted are 'hook', 'wrapper', 'biggan'"):
        U.spectral_norm(nn.Linear(2, 2), dialect="torch")


def test_every_name_of_torch_is_there():
    for name in nn.utils.__all__:
        assert hasattr(U, name)
    for name in torch_parametrizations.__all__:
        assert hasattr(U.parametrizations, name)


def test_reading_the_parameter_does_what_hangs_on_it():
    """The short way to the parameter is taken only where nothing else is to happen."""

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = U.parametrizations.spectral_norm(nn.Linear(4, 3)).eval()
    plain = layer.weight.detach()
    heard = []
    for module in (layer.parametrizations.weight, layer.parametrizations.weight[0]):
        handle = module.register_forward_hook(lambda *arguments: heard.append(1))
        assert torch.equal(layer.weight, plain) and heard
        handle.remove()
        heard.clear()
    with nn.utils.parametrize.cached():
        assert layer.weight is layer.weight
    assert torch.equal(copy.deepcopy(layer).weight, plain)
    nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    assert torch.equal(layer.weight, 2 * plain)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, 2 * plain) and type(layer) is nn.Linear


class ReadsWeight(nn.Module):
    """Reads its layer's weight itself."""

    def __init__(self, normalize):
        super().__init__()
        self.layer = normalize(nn.Linear(4, 3))

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight)


def read_shortly(how):
    if how == "gankern's":
        return ReadsWeight(U.parametrizations.spectral_norm)
    module = ReadsWeight(torch_parametrizations.spectral_norm)
    gankern.accelerate(module)
    return module


@pytest.mark.parametrize("how", ["gankern's", "accelerated"])
def test_the_short_way_leaves_to_torch_what_is_torchs(how):
    """What torch.fx records, and what somebody put in the place of a method, or of torch's own call of a module."""
    module, x = read_shortly(how).eval(), torch.randn(2, 4)
    assert torch.equal(module.layer.weight, module.layer.parametrizations.weight())
    traced = torch.fx.symbolic_trace(module)
    with torch.no_grad():
        module.layer.parametrizations.weight.original.mul_(3).add_(1)
    assert torch.equal(traced(x), module(x))  # it was not recorded as a constant

    members = module.layer.parametrizations.weight
    members.forward = lambda: 5 * members.original
    assert torch.equal(module.layer.weight, 5 * members.original)
    del members.forward
    members[0].forward = lambda weight: 7 * weight
    assert torch.equal(module.layer.weight, 7 * members.original)
    del members[0].forward
    for cls, name in ((nn.Module, "__call__"), (parametrize.ParametrizationList, "forward")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, name, lambda self, *args: torch.zeros(()))
            assert module.layer.weight.ndim == 0
    assert module.layer.weight.shape == (3, 4)


def test_restored_layers_are_read_as_torch_reads_them():
    module = ReadsWeight(torch_parametrizations.spectral_norm)
    of_torch = type(module.layer).__dict__["weight"]
    gankern.accelerate(module)
    copied = copy.deepcopy(module).eval()  # which shares the class of its layer
    assert type(module.layer).__dict__["weight"] is not of_torch
    gankern.restore(module)
    assert type(module.layer).__dict__["weight"] is of_torch
    assert torch.equal(copied.layer.weight, copied.layer.parametrizations.weight())


# ---- torch's own operations, where no file says of the device that ours are worth it --------------------------


@pytest.fixture
def by_torch(monkeypatch):
    """As on a GPU that no file speaks of; counts the layers that C++ takes through torch's operations."""
    monkeypatch.setattr(devices, "MEASURED", "another type of device")
    took, original = [], _by_torch.nodes.spectral_norm_by_torch

    def counted(*args):
        result = original(*args)
        took.append(result is not NotImplemented)
        return result

    monkeypatch.setattr(_by_torch.nodes, "spectral_norm_by_torch", counted)
    return took


def names_of_nodes(out):
    return sorted(type(node).__name__ for node in graph_nodes(out))


@pytest.mark.skipif(native.NODES_MISSING is not None, reason="the nodes are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_left_to_torch_to_the_bit(layer, form, dtype, by_torch):
    make, kind = LAYERS[layer]
    theirs = nn.Sequential(FORMS[form][0](make().to(dtype), n_power_iterations=2))
    ours = copy.deepcopy(theirs)
    gankern.accelerate(ours)
    for training in (True, False, True, True):
        theirs.train(training), ours.train(training)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in batch(kind)]
        results = []
        for module in (theirs[0], ours[0]):
            module.zero_grad()
            out = module(*inputs)
            parameters = [p for p in module.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(out.square().sum(), parameters, create_graph=True)
            sum(g.square().sum() for g in gradients).backward()
            grads = [p.grad for p in parameters]
            results.append(([out, *gradients, *grads, *module.buffers()], names_of_nodes(module.weight)))
        (right, graph), (got, our_graph) = results
        assert graph == our_graph
        for a, b in zip(right, got):
            assert (a is None and b is None) or (torch.equal(a, b) and a.stride() == b.stride())
    assert by_torch and all(by_torch)


@pytest.mark.parametrize("form", FORMS)
def test_replaced_parts_of_torchs_spectral_norm_run(form, by_torch, monkeypatch):
    theirs = nn.Sequential(FORMS[form][0](nn.Linear(6, 5)))
    gankern.accelerate(theirs)
    normalizer = next(iter(theirs[0]._forward_pre_hooks.values()), None) or theirs[0].parametrizations.weight[0]
    x = torch.randn(2, 6)

    def is_asked(place, name, of_instance=False):
        original, asked = getattr(place, name), []

        def replacement(*args, **kwargs):
            asked.append(1)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, replacement, raising=not of_instance)
            theirs(x)
        return bool(asked)

    parts = {"parametrization": ["_power_method", "_reshape_weight_to_matrix"], "hook": ["reshape_weight_to_matrix"]}
    cls = type(normalizer).__mro__[2]
    assert cls.__module__.startswith("torch.")
    for part in parts[form]:
        assert is_asked(cls, part) and is_asked(normalizer, part, of_instance=True), part
    not_called = {"parametrization": {"dot", "reshape", "t", "permute"}, "hook": {"vdot", "flatten", "permute"}}
    for place, names in _by_torch._LOOKED_UP.items():
        for name in sorted(set(names.split()) - not_called[form]):
            assert is_asked(place, name), name
    for place, name in ((torch.nn.functional, "normalize"), (torch, "norm"), (torch.Tensor, "norm")):
        assert is_asked(place, name), name
    monkeypatch.setattr(_by_torch, "KNOWN", {})
    _by_torch._is_known.cache_clear()
    by_torch.clear()
    theirs(x)
    assert not by_torch
    _by_torch._is_known.cache_clear()


def test_this_torch_is_one_that_it_was_compared_with():
    assert _by_torch._source() in _by_torch.KNOWN
