"""Layers that somebody wrote himself: replaced where their code is known, in both modes and at every call; else left."""

import copy
import functools

import patterns
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern
from gankern.acceleration import _expressions, _known, _read

EPS = 1e-8


def square(x):
    return x * x


class Written(nn.Module):
    """A layer with one thing to change."""

    def __init__(self):
        super().__init__()
        self.strength, self.eps, self.group_size, self.channels, self.limit = 1.0, 1e-8, 4, 1, 8
        self.seen, self.history, self.last = 0, [], None
        self.register_buffer("scale", torch.ones(1))


def pixel_norm(x, eps=1e-8):
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)


class Taken:
    """Ways of writing the same that are known."""

    class PixelNormByDivision(Written):
        def forward(self, x):
            return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + self.eps)

    class PixelNormByHelpers(Written):
        def forward(self, x):
            mean = torch.mean(square(x), axis=1, keepdims=True)
            return self.strength * x * (mean + EPS) ** -0.5

    class PixelNormOfSmallMaps(Written):
        def forward(self, x):
            return pixel_norm(x) if x.shape[-1] <= self.limit else x

    class StdDevOfAll(Written):
        def forward(self, x):
            size, _, height, width = x.shape
            y = x - x.mean(dim=0, keepdim=True)
            y = torch.sqrt(y.pow(2.0).mean(dim=0) + self.eps).mean().view(1, 1, 1, 1)
            return torch.cat([x, y.repeat(size, 1, height, width)], 1)

    class StdDevOfGroups(Written):
        def forward(self, x):
            n, c, h, w = x.size()
            g = min(n, self.group_size)
            y = x.view(g, -1, self.channels, c // self.channels, h, w)
            y = torch.sqrt(y.var(0, unbiased=False) + 1e-8)
            y = y.mean([2, 3, 4], keepdims=True).squeeze(2)
            return torch.cat([x, y.repeat(g, 1, h, w)], 1)

    class StdDevOfGroupsOrAll(Written):
        def forward(self, x):
            N, C, H, W = x.shape
            G = self.group_size if N % self.group_size == 0 else N
            y = x.reshape(G, -1, 1, C, H, W)
            y = y - y.mean(dim=0)
            y = (y.square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])
            return torch.cat([x, y.reshape(-1, 1, 1, 1).repeat(G, 1, H, W)], dim=1)

    class StdDevOfNeighbours(Written):
        def forward(self, x):
            n, c, h, w = x.shape
            y = x.reshape(n // 2, 2, c, h, w)
            y = (y.var(dim=1, correction=1) + 1e-8).sqrt().mean((1, 2, 3))
            y = y[:, None].expand(-1, 2).reshape(n, 1, 1, 1).expand(n, 1, h, w)
            return torch.cat((x, y), 1)


class Left:
    """What looks like them and is more, or other."""

    class SetsAnAttribute(Written):
        def forward(self, x):
            self.last = x
            return pixel_norm(x)

    class Counts(Written):
        def forward(self, x):
            self.seen += 1
            return pixel_norm(x)

    class Appends(Written):
        def forward(self, x):
            self.history.append(1)
            return pixel_norm(x)

    class Extends(Written):
        def forward(self, x):
            h = self.history
            h += [1]
            return pixel_norm(x)

    class Prints(Written):
        def forward(self, x):
            print("norm")
            return pixel_norm(x)

    class CountsInABuffer(Written):
        def forward(self, x):
            with torch.no_grad():
                self.scale[:] = x.mean()
            return pixel_norm(x)

    class OnlyInTraining(Written):
        def forward(self, x):
            return pixel_norm(x) if self.training else x

    class ByValue(Written):
        def forward(self, x):
            return pixel_norm(x) if x.mean() > -100 else x

    class InPlace(Written):
        def forward(self, x):
            x *= torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)
            return x

    class Wrapped(Written):
        @torch.no_grad()
        def forward(self, x):
            return pixel_norm(x)

    class Random(Written):
        def forward(self, x):
            return pixel_norm(x) + 0 * torch.rand(1)

    class OtherAxis(Written):
        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-8)

    class Unbiased(Written):
        """torch.std has a gradient of zero where samples are alike, and the square root of a variance has none."""

        def forward(self, x):
            y = torch.std(x, dim=0).mean().repeat(x.shape[0], 1, x.shape[2], x.shape[3])
            return torch.cat([x, y], 1)

    class Static(nn.Module):
        @staticmethod
        def forward(x, alpha: float = 1e-8):
            y = x.pow(2.0).mean(dim=1, keepdim=True).add(alpha).sqrt()
            return x / y

    class Caught(Written):
        def forward(self, x):
            try:
                return pixel_norm(x)
            finally:
                self.seen += 1


def classes(of):
    return pytest.mark.parametrize(
        "cls", [v for v in vars(of).values() if isinstance(v, type)], ids=lambda c: c.__name__
    )


def same(plain, fast, x, tolerance=1e-10):
    """Results, gradients and gradients of a penalty, in double precision."""
    seen = []
    for module in (plain, fast):
        leaf = x.double().requires_grad_()
        y = module(leaf * 1)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
        seen.append([y.detach()])
        if y.requires_grad:
            (grad,) = torch.autograd.grad((y * weights).sum(), leaf, create_graph=True)
            seen[-1].append(grad.detach())
            if grad.grad_fn is None:
                seen[-1].append(torch.zeros_like(leaf))
            else:
                (twice,) = torch.autograd.grad(grad.square().sum(), leaf, allow_unused=True)
                seen[-1].append(torch.zeros_like(leaf) if twice is None else twice)
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


def both(module):
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), module).double()
    fast = copy.deepcopy(plain)
    return plain, fast, gankern.accelerate(fast)


@classes(Taken)
def test_code_that_is_known(cls):
    torch.manual_seed(0)
    plain, fast, report = both(cls())
    name = "pixel_norm" if "Pixel" in cls.__name__ else "minibatch_stddev"
    assert f"gankern's {name}" in {row.after for row in report.replaced}
    for shape in ((8, 4, 6, 6), (4, 4, 3, 5), (2, 4, 4, 4), (8, 4, 16, 16), (12, 4, 2, 2)):
        for training in (True, False):
            plain.train(training), fast.train(training)
            same(plain, fast, torch.randn(shape))
    reading = _known.read(fast[1], (8, 4, 6, 6))
    assert reading.found.name == name


@classes(Left)
def test_code_that_is_more_or_other_is_left_alone(cls, capsys):
    torch.manual_seed(0)
    plain, fast, report = both(cls())
    assert "1" not in {row.layer for row in report.replaced}
    assert _known.recognise(fast[1])[1]  # a reason
    x = torch.randn(4, 4, 6, 6).double()
    with torch.no_grad():
        for _ in range(2):
            torch.manual_seed(1)
            a = plain(x)
            torch.manual_seed(1)
            assert torch.equal(a, fast(x))
    kept = [{k: v for k, v in vars(m[1]).items() if k in ("seen", "history")} for m in (plain, fast)]
    assert kept[0] == kept[1]
    assert torch.equal(getattr(plain[1], "scale", x), getattr(fast[1], "scale", x))


CHANGES = {
    "strength": (Taken.PixelNormByHelpers, lambda m: setattr(m, "strength", 0.25)),
    "a flag as strength": (Taken.PixelNormByHelpers, lambda m: setattr(m, "strength", True)),
    "eps": (Taken.PixelNormByDivision, lambda m: setattr(m, "eps", 0.5)),
    "groups": (Taken.StdDevOfGroups, lambda m: setattr(m, "group_size", 2)),
    "channels": (Taken.StdDevOfGroups, lambda m: setattr(m, "channels", 2)),
    "a limit": (Taken.PixelNormOfSmallMaps, lambda m: setattr(m, "limit", 2)),
    "forward": (Taken.PixelNormByDivision, lambda m: setattr(m, "forward", lambda x: 2 * x)),
    "a pre-hook": (Taken.PixelNormByDivision, lambda m: m.register_forward_pre_hook(lambda m, x: (3 * x[0] + 1,))),
    "a hook": (Taken.PixelNormByDivision, lambda m: m.register_forward_hook(lambda m, x, y: 3 * y)),
    "a tensor as strength": (Taken.PixelNormByHelpers, lambda m: setattr(m, "strength", torch.tensor(2.0))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_later_is_obeyed(name):
    cls, change = CHANGES[name]
    torch.manual_seed(0)
    plain, fast, report = both(cls())
    assert "1" in {row.layer for row in report.replaced}
    x = torch.randn(8, 4, 6, 6)
    same(plain, fast, x)
    before = plain(x.double())
    change(plain[1]), change(fast[1])
    same(plain, fast, x)
    after = plain(x.double())
    assert name == "a flag as strength" or after.shape != before.shape or not torch.equal(before, after)


def test_code_that_changes_later_is_obeyed(monkeypatch):
    torch.manual_seed(0)
    plain, fast, _ = both(Taken.PixelNormByHelpers())
    x = torch.randn(8, 4, 6, 6)
    same(plain, fast, x)
    monkeypatch.setitem(globals(), "EPS", 0.7)
    same(plain, fast, x)
    monkeypatch.setitem(globals(), "square", torch.abs)
    same(plain, fast, x)
    monkeypatch.undo()
    monkeypatch.setattr(square, "__code__", (lambda x: x * x * x * x).__code__)
    same(plain, fast, x)
    monkeypatch.undo()
    monkeypatch.setattr(Taken.PixelNormByHelpers, "forward", lambda self, x: 5 * x)
    same(plain, fast, x)


def test_a_closure_is_not_known():
    factor = 1.0

    class Closure(nn.Module):
        def forward(self, x):
            return factor * pixel_norm(x)

    assert "closure" in _known.recognise(Closure())[1]


def test_code_without_its_source_is_not_known():
    scope = {"nn": nn, "torch": torch}
    exec(
        "class Made(nn.Module):\n    def forward(self, x):\n"
        "        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)\n",
        scope,
    )
    assert "source" in _known.recognise(scope["Made"]())[1]


def test_own_access_to_attributes_is_not_known():
    class Watched(Taken.PixelNormByDivision):
        def __getattribute__(self, name):
            return 0.5 if name == "eps" else super().__getattribute__(name)

    assert "__getattribute__" in _known.recognise(Watched())[1]


def test_half_precision_and_autocast_are_its_own():
    plain = Taken.PixelNormByDivision()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    x = 300 * torch.randn(2, 4, 3, 3)
    assert torch.equal(plain(x.half()), fast(x.half()))  # which overflows
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), fast(x))


def test_an_expression_has_one_form():
    reader = _read.Reader(nn.Module())
    x = _expressions.Value(_expressions.node("tensor", "x"), _expressions.axes_of("x", (2, 3)))
    one = reader.operation("div", x, reader.operation("sqrt", reader.operation("add", x, 1.0)))
    two = reader.operation("mul", reader.operation("rsqrt", reader.operation("add", 1.0, x)), x)
    assert one.same(two)
    with pytest.raises(_expressions.Unknown):
        reader.operation("add", x, reader.operation("view", x, 3, 2))  # other elements together
    with pytest.raises(_expressions.Unknown):
        reader.operation("mul", x, reader.operation("view", x, 2, 3, 1))


# ---- spectral norm --------------------------------------------------------------------------------------------


class Several(patterns.Iterating):
    """With further singular vectors, as BigGAN's layers have it."""

    def _start(self, outputs, eps=1e-12):
        super()._start(outputs, eps)
        self.num_svs = 2
        self.register_buffer("u1", torch.randn(1, outputs))
        self.register_buffer("sv1", torch.ones(1))

    def W_(self):
        w = self.weight.view(self.weight.size(0), -1)
        us, vs, sigmas = [], [], []
        for i in range(self.num_svs):
            with torch.no_grad():
                v = torch.matmul(getattr(self, f"u{i}"), w)
                for other in vs:
                    v = v - torch.mm(other, v.t()) * other / torch.mm(other, other.t())
                v = F.normalize(v, eps=self.eps)
                vs.append(v)
                u = torch.matmul(v, w.t())
                for other in us:
                    u = u - torch.mm(other, u.t()) * other / torch.mm(other, other.t())
                u = F.normalize(u, eps=self.eps)
                us.append(u)
                if self.training:
                    getattr(self, f"u{i}")[:] = u
            sigmas.append(torch.squeeze(torch.matmul(torch.matmul(v, w.t()), u.t())))
        if self.training:
            with torch.no_grad():
                for i, sigma in enumerate(sigmas):
                    getattr(self, f"sv{i}")[:] = sigma
        return self.weight / sigmas[0]


class SeveralLinear(nn.Linear, Several):
    def __init__(self, *args):
        nn.Linear.__init__(self, *args)
        self._start(self.out_features)

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class Logging(patterns.IteratingLinear):
    def W_(self):
        self.calls = getattr(self, "calls", 0) + 1
        return super().W_()


class Scaled(patterns.IteratingLinear):
    """A schedule: the weight's norm is brought to a value that the training changes."""

    def _start(self, outputs, eps=1e-12):
        super()._start(outputs, eps)
        self.strength = 1.0

    def W_(self):
        w = self.weight.view(self.weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(torch.matmul(self.u0, w), eps=self.eps)
            u = F.normalize(torch.matmul(v, w.t()), eps=self.eps)
            if self.training:
                self.u0[:] = u
        sigma = torch.squeeze(torch.matmul(torch.matmul(v, w.t()), u.t()))
        if self.training:
            with torch.no_grad():
                self.sv0[:] = sigma
        return self.weight / sigma * self.strength


def run(module, x, steps=3):
    for step in range(steps):
        module.train(step != 1)
        y = module(x)
        y.square().sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters() if p.grad is not None), *module.state_dict().values()]


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: patterns.CopiedWrapper(nn.Linear(6, 5), power_iterations=n),
        lambda n: patterns.IteratingLinear(6, 5),
        lambda n: SeveralLinear(6, 5),
        lambda n: Logging(6, 5),
        lambda n: Scaled(6, 5),
    ],
    ids=["wrapper", "biggan", "two singular vectors", "counts its calls", "schedule"],
)
def test_spectral_norm_of_ones_own(make, iterations):
    torch.manual_seed(0)
    plain = nn.Sequential(make(iterations), nn.Linear(5, 3)).double()
    fast = copy.deepcopy(plain)
    report = gankern.accelerate(fast)
    left = isinstance(plain[0], Logging | SeveralLinear)
    assert ("0" in {row.layer for row in report.left}) == left
    x = torch.randn(4, 6).double()
    for change in (lambda m: None, lambda m: setattr(m, "strength", 0.5), lambda m: setattr(m, "power_iterations", 4)):
        change(plain[0]), change(fast[0])
        for a, b in zip(run(plain, x), run(fast, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        plain.zero_grad(), fast.zero_grad()
    assert getattr(plain[0], "calls", 0) == getattr(fast[0], "calls", 0)


def repeating(layer, iterations):
    """BigGAN's layer with ``num_itrs``: in training each iteration goes on from the last, in evaluation from u0."""
    made = patterns.IteratingLinear(layer.in_features, layer.out_features)
    made.num_itrs = iterations
    return made


@pytest.mark.parametrize("iterations", [2, 3, 7])
@pytest.mark.parametrize(
    "form",
    [
        lambda layer, n: nn.utils.spectral_norm(layer, n_power_iterations=n),
        lambda layer, n: nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=n),
        lambda layer, n: patterns.CopiedWrapper(layer, power_iterations=n),
        repeating,
    ],
    ids=["hook", "parametrization", "wrapper", "biggan"],
)
def test_several_iterations(form, iterations):
    torch.manual_seed(0)
    plain = nn.Sequential(form(nn.Linear(6, 5), iterations), nn.ReLU(), form(nn.Linear(5, 3), iterations)).double()
    fast = copy.deepcopy(plain)
    report = gankern.accelerate(fast)
    assert {row.layer for row in report.replaced if "spectral norm" in row.after} == {"0", "2"}
    x = torch.randn(4, 6).double()
    for a, b in zip(run(plain, x), run(fast, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_complex_layers_are_left_alone(form):
    torch.manual_seed(0)
    plain = nn.Sequential(form(nn.Linear(4, 4, dtype=torch.complex64)), form(nn.Linear(4, 2, dtype=torch.complex64)))
    for take in (gankern.accelerate, gankern.nn.utils.group_spectral_norm):
        fast = copy.deepcopy(plain)
        report = take(fast)
        if take is gankern.accelerate:
            assert {row.layer for row in report.left} >= {"0", "1"}
        x = torch.randn(3, 4, dtype=torch.complex64)
        twin = copy.deepcopy(plain)
        assert torch.equal(twin(x), fast(x))
    mixed = nn.Sequential(form(nn.Linear(4, 4)), form(nn.Linear(4, 4)))
    gankern.accelerate(mixed)
    mixed.to(torch.complex64)
    mixed(torch.randn(3, 4, dtype=torch.complex64))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_complex_convolutions_have_torchs_second_derivative(dimensions):
    torch.manual_seed(0)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = getattr(nn, f"Conv{dimensions}d")(2, 3, 3, 1, 1, dtype=torch.complex128)
            self.last = nn.Linear(3 * 4**dimensions, 1).double()

        def forward(self, x):
            return self.last(self.c(x.to(torch.complex128)).abs().flatten(1))

    plain = Critic()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    grads = []
    for net in (plain, fast):
        x = torch.ones(2, 2, *[4] * dimensions, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        grads.append(torch.autograd.grad((g.flatten(1).norm(dim=1) - 1).square().mean(), net.c.weight)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("way", ["hook", "parametrization"])
@pytest.mark.parametrize("grouped", [False, True])
def test_sparse_embeddings_have_torchs_gradient(way, grouped):
    import gankern.nn.utils

    pair = {
        "hook": (nn.utils.spectral_norm, gankern.nn.utils.spectral_norm),
        "parametrization": (
            nn.utils.parametrizations.spectral_norm,
            gankern.nn.utils.parametrizations.spectral_norm,
        ),
    }[way]
    grads = []
    for form in pair:
        torch.manual_seed(0)
        net = nn.Sequential(form(nn.Embedding(10, 4, sparse=True, dtype=torch.float64)))
        if grouped and form is pair[1]:
            gankern.nn.utils.group_spectral_norm(net)
        (net(torch.tensor([1, 2, 2])) * torch.arange(12.0).view(3, 4)).sum().backward()
        grads.append(next(net.parameters()).grad.to_dense())
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


# ---- torch's own layers ---------------------------------------------------------------------------------------


@functools.cache
def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2),
        nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(4),
    ).double()  # fmt: skip


LATER = {
    "stride": lambda m: setattr(m[0], "stride", (2, 2)),
    "padding": lambda m: setattr(m[0], "padding", (2, 0)),
    "dilation": lambda m: setattr(m[9], "padding", (1, 1)),
    "slope": lambda m: setattr(m[1], "negative_slope", 0.5),
    "negative slope": lambda m: setattr(m[1], "negative_slope", -0.5),
    "eps": lambda m: setattr(m[2], "eps", 0.5),
    "momentum": lambda m: setattr(m[2], "momentum", None),
    "statistics": lambda m: (setattr(m[2], "running_mean", None), setattr(m[2], "running_var", None)),
    "no statistics tracked": lambda m: setattr(m[2], "track_running_stats", False),
    "pool": lambda m: setattr(m[4], "kernel_size", 3),
    "output padding": lambda m: setattr(m[5], "output_padding", (1, 1)),
    "upsampling": lambda m: setattr(m[6], "scale_factor", 3),
    "bilinear": lambda m: setattr(m[6], "mode", "bilinear"),
    "largest": lambda m: setattr(m[8], "stride", 1),
    "size": lambda m: setattr(m[10], "output_size", 2),
    "bias": lambda m: setattr(m[0], "bias", None),
    "weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 4, 3, 3).double())),
    "another forward": lambda m: setattr(m[3], "forward", lambda x: x * x),
    "evaluation": lambda m: m.eval(),
    "one in evaluation": lambda m: m[2].eval(),
    "another class": lambda m: setattr(m[1], "__class__", Squares),
}  # fmt: skip


class Squares(nn.LeakyReLU):
    def forward(self, input):
        return input * input


@pytest.mark.parametrize("name", LATER)
def test_layers_obey_what_is_set_later(name):
    plain = copy.deepcopy(layers())
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    x = torch.randn(4, 4, 8, 8)
    same(plain, fast, x, 1e-7)
    LATER[name](plain), LATER[name](fast)
    same(plain, fast, x, 1e-7)
    with torch.no_grad():
        torch.testing.assert_close(plain(x.double()), fast(x.double()))
    for a, b in zip(plain.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- back again -----------------------------------------------------------------------------------------------


def test_restore_where_nothing_was_replaced():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert not gankern.accelerate(net).replaced
    gankern.restore(net)
    with pytest.raises(ValueError, match="never accelerated"):
        gankern.restore(net)


def test_restore_leaves_what_was_set_since():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    gankern.accelerate(net)
    mine = lambda x: x  # noqa: E731
    net[1].forward = mine
    gankern.restore(net)
    assert net[1].forward is mine
    assert "forward" not in net[0].__dict__


def test_every_call_gives_the_same_bits():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 16), (16, 48), (48, 3))))
    gankern.accelerate(net)
    for size in (8, 16, 33):
        x = torch.randn(2, 3, size, size)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                first = net(x)
                assert all(torch.equal(first, net(x)) for _ in range(6))


@pytest.mark.parametrize("form", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm,
                                  patterns.CopiedWrapper, None])  # fmt: skip
def test_trained_after_inference_mode(form):
    torch.manual_seed(0)
    if form is None:
        net = nn.Sequential(patterns.IteratingConv2d(3, 8, 3, padding=1), patterns.IteratingConv2d(8, 8, 3, padding=1))
    else:
        net = nn.Sequential(*(form(nn.Conv2d(a, 8, 3, padding=1)) for a in (3, 8)))
    gankern.accelerate(net)
    x = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        net.train(training)
        with torch.inference_mode():
            net(x)
        net.train()
        net(x).sum().backward()
    grouped = [p.grad for p in net.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grouped)


# ---- the report -------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.never = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.last, self.table = nn.Linear(8, 1), nn.Embedding(4, 8)
        self.norm = nn.utils.spectral_norm(OwnConv(8, 8, 3, padding=1))

    def forward(self, x):
        return self.last(self.norm(F.relu(self.conv(x))).mean((2, 3)))


class OwnSpectralNorm(nn.utils.spectral_norm.__globals__["SpectralNorm"]):
    def compute_weight(self, module, do_power_iteration):
        return super().compute_weight(module, do_power_iteration) * 0.5


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1)


def test_report_lists_every_layer_and_what_never_ran():
    torch.manual_seed(0)
    net = Parts()
    (hook,) = net.norm._forward_pre_hooks.values()
    hook.__class__ = OwnSpectralNorm
    report = gankern.accelerate(net, verify=torch.randn(2, 3, 8, 8))
    listed = {row.layer for row in report.rows}
    assert listed >= {name for name, m in net.named_modules() if m._parameters}
    assert {row.layer for row in report.rows if "did not run" in row.note} == {"never", "table"}
    assert any("OwnSpectralNorm" in row.note for row in report.left if row.layer == "norm")
