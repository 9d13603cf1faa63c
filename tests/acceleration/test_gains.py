"""Accelerate makes nothing slower: what a call gains is known by its operations and their sizes, and where it is nothing
the layers are their own again."""

import copy
import math
import pickle
import sys

import pytest
import torch
from patterns import CopiedWrapper
from torch import nn

import gankern
from gankern.acceleration import _convolutions, _functions, _root, _scope, _spectral
from gankern.acceleration._scope import state
from gankern.core import devices
from gankern.core.native import NODES_MISSING
from gankern.nn.utils import _requests

pytestmark = pytest.mark.as_it_is


def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(4, 1, 4)
    )


def large():
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU(0.2))


def replaced(net):
    return [name for name, m in net.named_modules() if name and "forward" in m.__dict__]


def test_layers_of_a_call_that_gains_nothing_are_their_own(monkeypatch):
    # Once a process has compiled anything, as other tests do, layers stay as they are.
    monkeypatch.setattr(_root, "compiles", lambda: False)
    torch.manual_seed(0)
    plain = small()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    x = torch.randn(2, 3, 8, 8)
    assert replaced(fast) == ["0", "1", "2", "3", "4"]
    for _ in range(6):
        torch.testing.assert_close(fast(x), plain(x))
    assert replaced(fast) == []
    assert fast(x).grad_fn.name() == plain(x).grad_fn.name()
    # Another kind of call is looked at anew: a penalty, larger sizes.
    y = torch.randn(2, 3, 8, 8, requires_grad=True)
    fast(y)
    assert replaced(fast) == ["0", "1", "2", "3", "4"]
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for _ in range(6):
            twin(x)
        assert replaced(twin) == [] and replaced(fast) != []
        twin(x.repeat(2, 1, 1, 1))
        assert replaced(twin)
        gankern.restore(twin)
        twin(x)
        assert replaced(twin) == []
    for _ in range(6):
        fast(x)
    gankern.restore(fast)
    assert not any("forward" in m.__dict__ or "_gankern_changes" in m.__dict__ for m in fast.modules())


def test_a_restored_part_stays_restored():
    net = nn.Sequential(small(), nn.Flatten(), nn.Linear(1, 1))
    gankern.accelerate(net)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(6):
        net(x)
    gankern.restore(net[0])
    net(torch.randn(3, 3, 8, 8))
    assert replaced(net) == []


def test_what_gains_goes_on(monkeypatch):
    kinds = []
    convolution = _convolutions._resampled
    monkeypatch.setattr(_convolutions, "_resampled", lambda kind, *a: (kinds.append(kind), convolution(kind, *a))[1])
    torch.manual_seed(0)
    plain, x = large(), torch.randn(4, 32, 16, 16)
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    for call in range(10):
        kinds.clear()
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
        assert kinds == ["upsample"] * (call > 0)  # the first one finds out whether what is enlarged is kept
    small_x = torch.randn(1, 32, 2, 2)
    for _ in range(6):
        fast(small_x)
    kinds.clear()
    torch.testing.assert_close(fast(small_x), plain(small_x), rtol=1e-4, atol=1e-5)
    assert "upsample" not in kinds  # which would cost more than it saves


def watched(net, inputs, monkeypatch):
    """For each of them, whether torch's functions were watched in that forward."""
    seen, settle = [], _root.settle
    monkeypatch.setattr(_root, "settle", lambda: (seen.append(True), settle())[1])
    counts = []
    for x in inputs:
        seen.clear()
        net(x)
        counts.append(bool(seen))
    return counts


def test_ever_new_sizes_are_not_watched_where_larger_ones_gained_nothing(monkeypatch):
    torch.manual_seed(0)
    net = small()
    gankern.accelerate(net)
    settled(net, torch.randn(2, 3, 16, 16))
    smaller = [torch.randn(n, 3, h, w) for n in (1, 2) for h in (8, 9, 16) for w in (8, 11, 15)]
    assert not any(watched(net, smaller, monkeypatch))
    other = [torch.randn(3, 3, 8, 8), torch.randn(1, 3, 8, 17), torch.randn(2, 3, 8, 8, requires_grad=True)]
    assert all(watched(net, other, monkeypatch))


def test_few_forwards_are_watched_in_vain(monkeypatch):
    torch.manual_seed(0)
    net = small()
    gankern.accelerate(net)
    counts = watched(net, [torch.randn(1, 3, 8, 8 + n) for n in range(100)], monkeypatch)
    free, share = _root.Gains.free, _root.Gains.share
    assert all(counts[:free]) and sum(counts) <= free + 100 // share
    # What gains something is found all the same.
    monkeypatch.undo()
    net = large()
    gankern.accelerate(net)
    for n in range(2 * free):
        net(torch.randn(1, 32, 1, 1 + n))
    assert all(watched(net, [torch.randn(4, 32, 16, 16)] * 2 * share, monkeypatch)[-share:])


def test_a_kind_whose_last_forwards_gained_nothing_is_left(monkeypatch):
    monkeypatch.setattr(_root, "compiles", lambda: False)
    gains, kind = _root.Gains(), ((True, False, True), torch.Size((2, 3, 8, 8)))
    state.gained_by_watching, state.watched = 0.0, 5
    for gained in (100.0, 0.0, 0.0, 0.0):  # in the first one each half of a pair runs by itself
        state.gained = gained
        assert gains.need(kind) == _root.WATCHED
        gains.note(kind, 3)
    state.gained = 0.0
    assert gains.need(kind) == _root.PLAIN


def test_the_same_calls_run_the_same_code():
    """Nothing depends on time: two copies give the same bits at every step."""
    torch.manual_seed(0)
    nets = [large() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        gankern.accelerate(net)
    for size in (16, 2, 16, 3):
        x = torch.randn(2, 32, size, size)
        for _ in range(6):
            assert torch.equal(nets[0](x), nets[1](x))


def test_a_model_that_gains_nothing_for_the_example_is_left_alone():
    net = small()
    report = gankern.accelerate(net, example_inputs=torch.randn(2, 3, 8, 8))
    if not report.gains:
        assert not report.replaced and "left alone" in report.notes[-1]
        assert not any("forward" in m.__dict__ for m in net.modules())
    assert gankern.accelerate(large(), example_inputs=torch.randn(4, 32, 16, 16)).replaced


def settled(net, *inputs):
    for _ in range(6):
        net(*inputs)


def count_root_forwards(net):
    """Puts a count around what Python does at a call of the accelerated module."""
    calls, forward = [], net.__dict__["forward"]

    def counted(*args, **kwargs):
        calls.append(None)
        return _root.root_forward(*args, **kwargs)

    net.__dict__["forward"] = _root.RootForward(counted, *forward.args)
    return calls


@pytest.mark.skipif(NODES_MISSING is not None, reason="no native library")
def test_calls_that_need_nothing_run_the_class_s_forward(monkeypatch):
    monkeypatch.setattr(_root, "compiles", lambda: False)
    monkeypatch.setattr(_root.Gains, "free", 16)  # of four kinds

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x, flag=None):
            if flag is False:
                raise KeyError("asked for")
            return self.net(x) * (2 if flag else 1)

    torch.manual_seed(0)
    plain = Two()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    calls = count_root_forwards(fast)
    x = torch.randn(2, 3, 8, 8)
    leaf = x.clone().requires_grad_()
    kinds = (x,), (x, None), (x, True), (leaf,)
    for args in (*kinds, *kinds):  # to look at a call, the layers' forwards are put back for all
        settled(fast, *args), settled(plain, *args)
    calls.clear()
    for args in kinds:
        torch.testing.assert_close(fast(*args), plain(*args))
    assert not calls and not state.double
    # Another size, another mode, a keyword, another gradient mode, another class of tensor: looked at.
    for change in (
        lambda net: net(x[:1]),
        lambda net: net.eval()(x),
        lambda net: net.train()(x, flag=True),
        lambda net: torch.no_grad()(net)(x),
        lambda net: net(nn.Parameter(x)),
    ):
        calls.clear()
        torch.testing.assert_close(change(fast), change(plain))
        assert calls
    settled(fast, leaf)
    with pytest.raises(KeyError):
        fast(leaf, False)
    assert not state.double
    calls.clear()
    torch.testing.assert_close(copy.deepcopy(fast)(x), copy.deepcopy(plain)(x))
    assert calls  # a copy finds out anew


def test_a_call_that_is_remembered_can_be_compiled():
    torch.manual_seed(0)
    net = small()
    x = torch.randn(2, 3, 8, 8)
    gankern.accelerate(net)
    settled(net, x)
    expected = net(x)
    torch._dynamo.reset()
    try:
        torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), expected)
    finally:
        torch._dynamo.reset()


def pair_and_norm():
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(2),
    )


@pytest.mark.parametrize("from_values", [None, 0, 8 * 8 * 16, 2**30])
def test_a_device_that_was_not_measured_runs_the_original(monkeypatch, from_values):
    """The CPU in the place of one: its file says from how many values on what is worth it, or there is none."""
    monkeypatch.setattr(_root, "compiles", lambda: False)
    monkeypatch.setattr(_convolutions, "PAIR", 0.0)
    monkeypatch.setattr(_convolutions, "CALL", -math.inf)
    monkeypatch.setattr(_functions, "FROM", {"cpu": 0})
    monkeypatch.setattr(_root.Gains, "operation", 0.0)
    monkeypatch.setattr(_root.Gains, "forward", 0.0)
    monkeypatch.setattr(_root.Gains, "layer", 0.0)
    monkeypatch.setattr(devices, "MEASURED", "no type of device")
    known = {} if from_values is None else dict.fromkeys((_scope.PAIRS, _scope.SECOND), from_values)
    monkeypatch.setattr(devices, "gains_from", lambda what, device: known.get(what, math.inf))
    torch.manual_seed(0)
    plain = pair_and_norm()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    x = torch.randn(4, 8, 4, 8).requires_grad_()
    for _ in range(_root.Gains.patience + 3):
        ours, theirs = fast(x), plain(x)
        torch.testing.assert_close(ours, theirs)
    taken = from_values in (0, 8 * 8 * 16)
    assert bool(replaced(fast)) == taken
    (one,), (other,) = (torch.autograd.grad(y.square().sum(), x, create_graph=True) for y in (ours, theirs))
    parameters = [[x, *net.parameters()] for net in (fast, plain)]
    for a, b in zip(
        torch.autograd.grad(one.square().sum(), parameters[0]), torch.autograd.grad(other.square().sum(), parameters[1])
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if not taken:
        assert torch.equal(ours, theirs) and torch.equal(one, other)


@pytest.mark.parametrize("from_values", [math.inf, 32 * 16 * 9, 0])
@pytest.mark.parametrize("form", ["hook", "parametrization", "copied wrapper"])
def test_spectral_norms_too_are_the_originals_where_nothing_was_measured(monkeypatch, form, from_values):
    """The CPU in the place of a device whose file says from how many values of a weight on ours is worth it."""
    monkeypatch.setattr(_spectral, "FROM", 0)
    monkeypatch.setattr(devices, "MEASURED", "no type of device")
    monkeypatch.setattr(devices, "gains_from", lambda what, device: {"spectral norm": from_values}.get(what, math.inf))
    asked, normalize = [], _requests.normalize
    for module in (_requests, _spectral):
        monkeypatch.setattr(module, "normalize", lambda request: asked.append(request) or normalize(request))
    normed = {
        "hook": nn.utils.spectral_norm,
        "parametrization": nn.utils.parametrizations.spectral_norm,
        "copied wrapper": CopiedWrapper,
    }[form]
    torch.manual_seed(0)
    plain = nn.Sequential(normed(nn.Conv2d(16, 16, 3)), nn.LeakyReLU(0.2), normed(nn.Conv2d(16, 32, 3)))
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    x = torch.randn(2, 16, 8, 8)
    for mode in (True, False):
        ours, theirs = fast.train(mode)(x), plain.train(mode)(x)
        torch.testing.assert_close(ours, theirs)
        assert len(asked) == {math.inf: 0, 0: 2}.get(from_values, 1)
        asked.clear()
    assert from_values < math.inf or torch.equal(ours, theirs)
    if form != "copied wrapper":  # whoever asks for it has it on any device
        gankern.nn.utils.group_spectral_norm(fast)
        fast(x)
        assert len(asked) == 2
    gankern.restore(fast)
    assert not any("where_known" in getattr(m, "__dict__", {}) for m in fast.modules())


def test_what_is_not_known_of_a_device_is_not_counted(monkeypatch):
    """Else layers keep a way around torch's forward on which nothing of ours runs."""
    x, weight = torch.empty(64, 100, 8, 8, device="meta"), torch.empty(100, 512, 4, 4, device="meta")
    for known in (False, True):
        monkeypatch.setattr(devices, "is_known", lambda what, x, known=known: known)
        assert (_convolutions._worth("upsample", 1, x, weight) > 0) is known


def test_the_native_call_comes_first():
    assert _root.RootForward.__mro__[1] is _root.PlainForward
    if sys.version_info >= (3, 12) and not NODES_MISSING:
        assert not _root.RootForward.__flags__ & (1 << 11), "the vectorcall of functools.partial is inherited"
