"""Pairs of operations that run as one, in the ways in which they are written: met wherever they are called, equal to the
original in double precision, and gone after restore."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern
from gankern.acceleration import _convolutions, _norms


@pytest.fixture
def fused(monkeypatch):
    """The pairs that ran, in order: "upsample", "downsample", "relu", "leaky_relu"."""
    seen = []
    convolution, normalize = _convolutions.convolution, _norms._normalize

    def recorded_convolution(kind, *args):
        result = convolution(kind, *args)
        if result is not None and kind in ("upsample", "downsample"):
            seen.append(kind)
        return result

    def recorded_normalize(*args):
        seen.extend(args[6:7] if len(args) > 6 and args[6] else ())
        return normalize(*args)

    monkeypatch.setattr(_convolutions, "convolution", recorded_convolution)
    monkeypatch.setattr(_norms, "_normalize", recorded_normalize)
    monkeypatch.setattr(_norms, "LARGE", 1)
    return seen


def step(net, x):
    """Results, gradients, gradients of a penalty, buffers, twice."""
    seen = []
    for _ in range(2):
        leaf = x.detach().clone().requires_grad_()
        y = net(leaf)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
        (grad,) = torch.autograd.grad((y * weights).sum(), leaf, create_graph=True)
        parameters = list(net.parameters())
        penalty = torch.autograd.grad(grad.square().sum(), parameters, allow_unused=True, retain_graph=True)
        grads = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        seen += [y.detach(), grad.detach(), *penalty, *grads, *(b.clone() for b in net.buffers())]
    with torch.no_grad():
        seen.append(net(x))
    return seen


def check(net, x, tolerance=1e-12):
    """Compares a module with its accelerated copy, which is then restored to the bit. Returns the report."""
    net, x = net.double(), x.double()
    fast, pristine = copy.deepcopy(net), copy.deepcopy(net)
    keys = [set(m.__dict__) for m in fast.modules()]
    report = gankern.accelerate(fast)
    with torch.no_grad():
        y, expected = copy.deepcopy(fast)(x), copy.deepcopy(net)(x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert y.stride() == expected.stride()
    for a, b in zip(step(net, x), step(fast, x), strict=True):
        if a is None or b is None:
            assert a is None or not a.any()
            assert b is None or not b.any()
            continue
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    gankern.restore(fast)
    assert [set(m.__dict__) for m in fast.modules()] == keys
    fast.load_state_dict(pristine.state_dict())
    for a, b in zip(step(pristine, x), step(fast, x), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    return report


class Wrapper(nn.Module):
    """Passes on to the layer inside, by calling it or its forward."""

    def __init__(self, layer, directly=False):
        super().__init__()
        self.layer, self.directly = layer, directly

    def forward(self, x):
        return self.layer.forward(x) if self.directly else self.layer(x)


class OwnConv(nn.Conv2d):
    """A subclass that calls the function by itself."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Calls(nn.Module):
    """A forward that is given as a function of the module and the input."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class Scaled:
    """A pre-hook that makes the weight, as equalised learning rates are written."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, module, inputs):
        module.weight = module.weight_orig * self.scale

    @staticmethod
    def on(layer):
        weight = layer._parameters.pop("weight")
        layer.weight_orig = nn.Parameter(weight.detach() * 2)
        layer.weight = weight.detach()
        layer.register_forward_pre_hook(Scaled(0.5))
        return layer


def conv(cls=nn.Conv2d):
    return cls(8, 8, 3, padding=1)


def body(*layers):
    return nn.Sequential(*layers)


MEANS = {
    "wrapped": lambda: body(Wrapper(conv()), nn.LeakyReLU(0.2), Wrapper(conv(), True), nn.AvgPool2d(2)),
    "a wrapper in a wrapper": lambda: body(Wrapper(Wrapper(conv())), nn.AvgPool2d(2)),
    "the last of a Sequential": lambda: Calls(
        lambda m, x: F.avg_pool2d(m.branch(x), 2), branch=body(nn.ReLU(), conv())
    ),
    "pool of another module": lambda: Calls(
        lambda m, x: m.pool(m.block(x)), block=Calls(lambda m, x: m.conv(F.relu(x)), conv=conv()), pool=nn.AvgPool2d(2)
    ),
    "pool made in forward": lambda: Calls(lambda m, x: nn.AvgPool2d(2)(m.conv(x)), conv=conv()),
    "pool held as a function": lambda: Calls(
        lambda m, x: m.pool(m.conv(x)), conv=conv(), pool=functools.partial(F.avg_pool2d, kernel_size=2)
    ),
    "a layer of its own": lambda: Calls(lambda m, x: m.pool(m.conv(x)), conv=conv(OwnConv), pool=nn.AvgPool2d(2)),
    "shortcut between": lambda: Calls(
        lambda m, x: (lambda h, s: F.avg_pool2d(h, 2) + F.avg_pool2d(s, 2))(m.conv(x), m.short(x)),
        conv=conv(),
        short=nn.Conv2d(8, 8, 1),
    ),
    "spectral norm hook": lambda: body(nn.utils.spectral_norm(conv()), nn.AvgPool2d(2)),
    "spectral norm parametrization": lambda: body(nn.utils.parametrizations.spectral_norm(conv()), nn.AvgPool2d(2)),
    "one pool object": lambda: (lambda pool: body(conv(), pool, conv(), pool))(nn.AvgPool2d(2)),
}

UPSAMPLINGS = {
    "both branches enlarged first": lambda: Calls(
        lambda m, x: (lambda h, s: m.conv(h) + m.short(s))(m.up(F.relu(x)), m.up(x)),
        conv=conv(),
        short=nn.Conv2d(8, 8, 1),
        up=functools.partial(F.interpolate, scale_factor=2),
    ),
    "F.upsample": lambda: Calls(lambda m, x: m.conv(F.upsample(x, scale_factor=2)), conv=conv()),
    "F.upsample by size": lambda: Calls(lambda m, x: m.conv(F.upsample(x, size=(16, 16))), conv=conv()),
    "F.upsample_nearest": lambda: Calls(lambda m, x: m.conv(F.upsample_nearest(x, scale_factor=2)), conv=conv()),
    "in another module": lambda: body(Calls(lambda m, x: F.interpolate(x, scale_factor=2)), Wrapper(conv())),
    "nn.Upsample in a block": lambda: body(body(nn.Upsample(scale_factor=2)), body(conv())),
    "weight-scaling pre-hook": lambda: body(nn.Upsample(scale_factor=2), Scaled.on(conv())),
    "weight made in forward": lambda: Calls(
        lambda m, x: F.conv2d(F.interpolate(x, scale_factor=2), m.weight * 0.5, padding=1),
        weight=nn.Parameter(torch.randn(8, 8, 3, 3)),
    ),
    "a layer of its own": lambda: Calls(lambda m, x: m.conv(F.interpolate(x, scale_factor=2)), conv=conv(OwnConv)),
}

ACTIVATIONS = {
    "F.batch_norm": lambda: Calls(
        lambda m, x: F.relu(F.batch_norm(x, m.mean, m.var, m.weight, m.bias, m.training)),
        mean=nn.Buffer(torch.zeros(8)),
        var=nn.Buffer(torch.ones(8)),
        weight=nn.Parameter(torch.rand(8)),
        bias=nn.Parameter(torch.rand(8)),
    ),
    "F.batch_norm without statistics": lambda: Calls(
        lambda m, x: F.leaky_relu(F.batch_norm(m.conv(x), None, None, training=True), 0.3), conv=nn.Conv2d(8, 8, 1)
    ),
    "an activation in another module": lambda: body(
        body(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), body(nn.LeakyReLU(0.2))
    ),
    "one activation object": lambda: (
        lambda act: body(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), act, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), act)
    )(nn.ReLU()),
    "F.relu held": lambda: Calls(lambda m, x: m.act(m.norm(x)), norm=nn.BatchNorm2d(8), act=F.relu),
    "torch.relu held": lambda: Calls(lambda m, x: m.act(m.norm(x)), norm=nn.BatchNorm2d(8), act=torch.relu),
    "nn.functional.leaky_relu held": lambda: Calls(
        lambda m, x: m.act(m.norm(x)), norm=nn.BatchNorm2d(8), act=nn.functional.leaky_relu
    ),
    "a partial held": lambda: Calls(
        lambda m, x: m.act(m.norm(x)),
        norm=nn.BatchNorm2d(8),
        act=functools.partial(F.leaky_relu, negative_slope=0.3),
    ),
    "a table of functions": lambda: Calls(
        lambda m, x: m.acts["relu"](m.norm(x)), norm=nn.BatchNorm2d(8), acts={"relu": F.relu}
    ),
}

PRELUS = {
    "behind batch norm": lambda: (body(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.PReLU()), ["prelu"]),
    "behind instance norm, of each channel": lambda: (
        body(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)),
        ["prelu"],
    ),
    "F.prelu in another module": lambda: (
        Calls(lambda m, x: F.prelu(m.norm(x), m.slope), norm=nn.BatchNorm2d(8), slope=nn.Parameter(torch.rand(8))),
        ["prelu"],
    ),
    "one object at two places": lambda: (
        (lambda act: body(nn.BatchNorm2d(8), act, nn.Conv2d(8, 8, 1), act))(nn.PReLU()),
        ["prelu"],
    ),
    "behind a convolution": lambda: (body(nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(8)), []),
    "behind a pixel shuffle": lambda: (body(nn.Conv2d(8, 8, 1), nn.PixelShuffle(2), nn.PReLU(2)), []),
}


PADDINGS = {
    "nn.ReflectionPad2d": lambda: body(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.ReLU()),
    "nn.ReplicationPad2d": lambda: body(body(nn.ReplicationPad2d(1)), body(nn.Conv2d(8, 8, 3, bias=False))),
    "F.pad": lambda: Calls(lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")), conv=nn.Conv2d(8, 8, 3)),
    "padding_mode": lambda: body(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
    "CycleGAN's block": lambda: Calls(
        lambda m, x: x + m.main(x),
        main=body(
            *(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(True)),
            *(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8)),
        ),
    ),
}
NO_PADDINGS = {
    "of three": lambda: body(nn.ReflectionPad2d(3), nn.Conv2d(8, 4, 7)),
    "of one side": lambda: body(nn.ReflectionPad2d((1, 0, 1, 0)), nn.Conv2d(8, 4, 3)),
    "before a padded convolution": lambda: body(nn.ReflectionPad2d(1), nn.Conv2d(8, 4, 3, padding=1)),
    "used twice": lambda: Calls(
        lambda m, x: (lambda p: m.conv(p) + p[:, :, 1:-1, 1:-1])(m.pad(x)),
        pad=nn.ReflectionPad2d(1),
        conv=nn.Conv2d(8, 8, 3),
    ),
    "of zeros": lambda: body(nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3)),
    "one dimension": lambda: Calls(
        lambda m, x: m.conv(m.pad(x.flatten(2))), pad=nn.ReflectionPad1d(1), conv=nn.Conv1d(8, 4, 3)
    ),
}


DIMENSIONS = {
    "BatchNorm1d": (lambda: body(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (8, 5)),
    "BatchNorm1d of sequences": (lambda: body(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.LeakyReLU(0.2)), (3, 4, 9)),
    "BatchNorm3d": (lambda: body(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4), nn.ReLU()), (2, 4, 3, 4, 5)),
    "BatchNorm3d, in place": (lambda: body(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4), nn.ReLU(True)), (2, 4, 3, 4, 5)),
}


def run_counted(net, x, fused):
    """The pairs of one forward and backward of a training step, after the first forwards."""
    net = net.double()
    gankern.accelerate(net)
    x = x.double().requires_grad_()
    for _ in range(6):
        fused.clear()
        net(x).sum().backward()
    return list(fused)


@pytest.mark.parametrize("name", MEANS)
def test_convolution_and_mean(name, fused):
    torch.manual_seed(0)
    check(MEANS[name](), torch.randn(2, 8, 8, 8))
    assert run_counted(MEANS[name](), torch.randn(2, 8, 8, 8), fused).count("downsample") == (
        2 if name == "one pool object" else 1
    )


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", UPSAMPLINGS)
def test_upsampling_and_convolution(name, fused):
    torch.manual_seed(0)
    check(UPSAMPLINGS[name](), torch.randn(2, 8, 8, 8))
    assert run_counted(UPSAMPLINGS[name](), torch.randn(2, 8, 8, 8), fused).count("upsample") == 1


@pytest.mark.parametrize("factor", [4, 1.5, 0.5, (2, 3), (2, 2)])
def test_upsampling_by_other_factors(factor, fused):
    """nn.Upsample keeps one number as a float."""

    def make():
        return nn.Sequential(nn.Upsample(scale_factor=factor), nn.Conv2d(8, 8, 3, padding=1))

    torch.manual_seed(0)
    check(make(), torch.randn(2, 8, 8, 8))
    assert run_counted(make(), torch.randn(2, 8, 8, 8), fused).count("upsample") == (factor == (2, 2))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_batch_norm_and_activation(name, fused):
    torch.manual_seed(0)
    check(ACTIVATIONS[name](), torch.randn(4, 8, 5, 5), tolerance=1e-9)
    found = run_counted(ACTIVATIONS[name](), torch.randn(4, 8, 5, 5), fused)
    assert len([f for f in found if "relu" in f]) == (2 if name == "one activation object" else 1)


@pytest.mark.parametrize("name", PRELUS)
def test_prelu(name, fused, monkeypatch):
    monkeypatch.setattr(_norms, "SMALL", 1)
    torch.manual_seed(0)
    net, expected = PRELUS[name]()
    report = check(net, torch.randn(4, 8, 5, 5), tolerance=1e-9)
    assert "PReLU" in str(report) or "prelu" in str(report)
    assert run_counted(PRELUS[name]()[0], torch.randn(4, 8, 5, 5), fused) == expected
    if not expected or "places" in name:
        assert gankern.last_implementation("bias_act") is not None


@pytest.fixture
def borders(monkeypatch):
    """The borders of the convolutions that ran as one with them, by rows."""
    seen = []
    convolution = _convolutions.convolution

    def recorded(*args, **options):
        # As on a machine where the rows were measured to be faster for these maps.
        result = convolution(*args, **options, implementation="cpu" if options.get("border") else None)
        if result is not None and options.get("border"):
            seen.append(options["border"])
        return result

    monkeypatch.setattr(_convolutions, "convolution", recorded)
    monkeypatch.setattr(_convolutions, "_repays", lambda *args: True)
    return seen


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_and_convolution(name, borders):
    torch.manual_seed(0)
    check(PADDINGS[name](), torch.randn(2, 8, 9, 8), tolerance=1e-9)
    assert run_counted(PADDINGS[name](), torch.randn(2, 8, 9, 8), borders) == (
        [2] if "Replication" in name else [1, 1] if "block" in name else [1]
    )


@pytest.mark.parametrize("name", NO_PADDINGS)
def test_other_paddings(name, borders):
    torch.manual_seed(0)
    check(NO_PADDINGS[name](), torch.randn(2, 8, 9, 8), tolerance=1e-9)
    assert len(run_counted(NO_PADDINGS[name](), torch.randn(2, 8, 9, 8), borders)) == (name == "used twice")


@pytest.mark.parametrize("name", DIMENSIONS)
def test_batch_norm_of_other_dimensions(name, fused):
    make, shape = DIMENSIONS[name]
    torch.manual_seed(0)
    check(make(), torch.randn(shape), tolerance=1e-9)
    assert len([f for f in run_counted(make(), torch.randn(shape), fused) if "relu" in f]) == 1


class Dropped(nn.Module):
    """A batch norm that runs for its running statistics alone: nobody takes its result."""

    def __init__(self, last):
        super().__init__()
        self.norm, self.act, self.last = nn.BatchNorm2d(4), nn.ReLU(), last

    def forward(self, x):
        y = self.act(x.clone() if self.last else self.norm(x))
        self.norm(x + 1)
        return y if self.last else y * 2


@pytest.mark.parametrize("last", [False, True])
def test_a_norm_whose_result_nobody_takes(last, fused):
    check(Dropped(last), torch.randn(2, 4, 6, 6))


def test_a_norm_before_a_forward_is_left_by_an_exception(fused):
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            h = self.norm(x)
            if x.shape[0] == 2:
                raise StopIteration
            return self.act(h)

    net, fast = Left(), Left()
    gankern.accelerate(fast)
    for size in (3, 2, 3, 2):
        x = torch.randn(size, 4, 5, 5, requires_grad=True)
        for model in (net, fast):
            with contextlib.suppress(StopIteration):
                model(x)
    torch.testing.assert_close(fast.state_dict(), net.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("features, channels", [(8, 1), (8, 4), (1, 4)])
@pytest.mark.parametrize("affine", [False, True])
def test_channels_that_do_not_fit_are_torchs_error(affine, features, channels, training, fused):
    net = nn.Sequential(nn.BatchNorm2d(features, affine=affine), nn.ReLU()).train(training)
    fast = copy.deepcopy(net)
    gankern.accelerate(fast)
    for model in (net, fast):
        with pytest.raises(RuntimeError, match=f"running_mean should contain {channels} elements not {features}"):
            model(torch.randn(2, channels, 4, 4, requires_grad=True))


@pytest.mark.parametrize("training", [False, True])
def test_computed_statistics_are_torchs_error(training, fused):
    class Computed(nn.Module):
        def forward(self, x):
            return F.relu(F.batch_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3)), training=training))

    net, fast = Computed(), Computed()
    gankern.accelerate(fast)
    for model in (net, fast):
        x = torch.randn(2, 4, 6, 6, requires_grad=True)
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_mean'"):
            model(x)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("behind", [nn.Identity, nn.ReLU, nn.Dropout])
def test_instance_norm_has_torchs_memory_format(affine, training, behind):
    """Of a channels_last map it makes a contiguous one; the elements that a dropout takes go by that."""
    torch.manual_seed(0)
    net = body(nn.InstanceNorm2d(8, affine=affine, track_running_stats=True), behind(), nn.Dropout(0.5)).double()
    fast = copy.deepcopy(net)
    gankern.accelerate(fast)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    results = []
    for model in (net, fast):
        model.train()[0].train(training)
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.stride() == expected.stride()


class Swapping(nn.Module):
    """Its input becomes another tensor between the two halves of a pair."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.up, self.conv = kind, nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.act = nn.InstanceNorm2d(16), nn.ReLU()

    def forward(self, x):
        first, second = (self.up, self.conv) if self.kind == "upsample" else (self.norm, self.act)
        x = x.detach().clone()
        other = torch.zeros_like(x)
        y = first(x)
        torch.utils.swap_tensors(x, other)
        return second(y)


@pytest.mark.parametrize("kind", ["upsample", "norm"])
def test_a_tensor_that_is_swapped_while_a_layer_waits_is_noticed(kind):
    torch.manual_seed(0)
    net = Swapping(kind)
    x = torch.randn(4, 16, 32, 32)
    right = net(x)
    gankern.accelerate(net)
    try:
        found = net(x)
    except RuntimeError as error:
        assert "overwritten between two operations that run as one" in str(error)
    else:
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of_inference", ["input", "weights"])
def test_tensors_made_in_inference_mode(of_inference):
    """Nobody counts how often those are written to: nothing waits on them."""
    torch.manual_seed(0)

    def make():
        up, conv = nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1)
        padded = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        return nn.Sequential(up, conv, nn.AvgPool2d(2), padded, nn.InstanceNorm2d(16, affine=True), nn.ReLU())

    x = torch.randn(2, 16, 32, 32)
    with torch.inference_mode():
        net = make()
        x = x.clone() if of_inference == "input" else x
    if of_inference == "input":
        net = make()
    with torch.no_grad():
        right = net(x)
        gankern.accelerate(net)
        for _ in range(3):
            torch.testing.assert_close(net(x), right, rtol=1e-4, atol=1e-4)
