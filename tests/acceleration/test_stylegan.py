"""StyleGAN2's operations in pure PyTorch, as people copy them: known by their code, else left with a reason."""

import copy

import pytest
import stylegan
import torch
import torch.nn.functional as F
from torch import nn

import gankern
from gankern.acceleration import _known

KNOWN = {
    "bias and leaky ReLU": (lambda: stylegan.LeakyBias(4), "bias_act"),
    "another slope": (lambda: stylegan.LeakyBias(4, 0.1, 1.0), "bias_act"),
    "of maps, in place": (lambda: stylegan.LeakyBiasOfMaps(4), "bias_act"),
    "without a bias": (lambda: stylegan.Scaled(), "bias_act"),
    "clamped": (lambda: stylegan.ReluClamped(4), "bias_act"),
    "blur": (lambda: stylegan.Resample(pad=(2, 1)), "upfirdn2d"),
    "blur that crops": (lambda: stylegan.Resample(pad=(-1, -2)), "upfirdn2d"),
    "up": (lambda: stylegan.Resample(gain=4.0, up=2, pad=(2, 1)), "upfirdn2d"),
    "down": (lambda: stylegan.Resample(down=2, pad=(1, 1)), "upfirdn2d"),
    "up by 3, down by 2": (lambda: stylegan.Resample(up=3, down=2, pad=(2, 2)), "upfirdn2d"),
    "grouped": (lambda: stylegan.ResampleGrouped(up=2, pad=2), "upfirdn2d"),
    "grouped, down": (lambda: stylegan.ResampleGrouped(down=2, pad=1), "upfirdn2d"),
    "grouped, cropping": (lambda: stylegan.ResampleGrouped(pad=-1), "upfirdn2d"),
    "flipped": (lambda: stylegan.ResampleFlipped(pad=2), "upfirdn2d"),
}


def seen(net, x):
    leaf = x.detach().clone().requires_grad_()
    y = net(leaf * 1)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    (grad,) = torch.autograd.grad((y.square() * weights).sum(), leaf, create_graph=True)
    second = torch.autograd.grad(grad.square().sum(), [leaf, *net.parameters()], allow_unused=True)
    return [y.detach(), grad.detach(), *(torch.zeros(()) if g is None else g for g in second)]


@pytest.mark.parametrize("name", KNOWN)
def test_known(name):
    make, found = KNOWN[name]
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), make()).double()
    fast = copy.deepcopy(plain)
    report = gankern.accelerate(fast)
    assert [row.after for row in report.replaced if row.layer == "1"] == [f"gankern's {found}"]
    for shape in ((2, 4, 16, 16), (3, 4, 12, 9), (1, 4, 8, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        assert _known.read(fast[1], shape, "cpu", torch.float64).found is not None
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-13, atol=1e-13)
        for a, b in zip(seen(plain, x), seen(fast, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    gankern.restore(fast)
    assert "forward" not in fast[1].__dict__
    assert torch.equal(plain(x), fast(x))


def test_linear_layers_biases_too():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), stylegan.LeakyBias(4)).double()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    x = torch.randn(5, 3, dtype=torch.float64)
    for a, b in zip(seen(plain, x), seen(fast, x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


class Along(stylegan.LeakyBias):
    """The bias along the width."""

    def forward(self, x):
        return F.leaky_relu(x + self.bias, self.slope) * self.scale


class Twice(stylegan.LeakyBias):
    def forward(self, x):
        return stylegan.leaky_bias(x, self.bias + self.bias, self.slope, self.scale)


class AddsLater(stylegan.LeakyBias):
    def forward(self, x):
        return F.leaky_relu(x, self.slope) * self.scale + self.bias.view(1, -1, 1, 1)


class OtherWay(stylegan.Resample):
    """The second axis padded otherwise."""

    def forward(self, x):
        return stylegan.resample(x, self.kernel, pad=(2, 1, 1, 2))


class Circular(stylegan.Resample):
    def forward(self, x):
        x = F.pad(x, [1, 2, 1, 2], mode="circular")
        return stylegan.resample_grouped(x, self.kernel)


class Transposed(stylegan.Resample):
    def forward(self, x):
        return stylegan.resample_grouped(x.transpose(2, 3), self.kernel, padding=2)


LEFT = {
    "along the width": (lambda: Along(4), None),
    "twice the bias": (lambda: Twice(4), None),
    "a bias behind it": (lambda: AddsLater(4), None),
    "a decorated function": (lambda: stylegan.ResampleWatched(pad=2), "decorated or a closure"),
    "axes apart": (lambda: OtherWay(), None),
    "circular": (lambda: Circular(), "padding"),
    "transposed": (lambda: Transposed(), None),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name):
    make, reason = LEFT[name]
    torch.manual_seed(0)
    layer = make()
    found, why = _known.recognise(layer)
    assert found is None and why
    assert reason is None or reason in why
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), layer).double()
    fast = copy.deepcopy(plain)
    report = gankern.accelerate(fast)
    assert any(row.layer == "1" for row in report.rows)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-13, atol=1e-13)


def test_a_kernel_that_is_trained_is_left():
    layer = stylegan.Resample(pad=(2, 1))
    layer.kernel.requires_grad_()
    assert _known.recognise(layer)[0] is None


def test_what_changes_later_is_obeyed():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), stylegan.Resample(pad=(2, 1)), stylegan.LeakyBias(4)).double()
    fast = copy.deepcopy(plain)
    gankern.accelerate(fast)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    kernel = torch.rand(3, 3, dtype=torch.float64)
    changes = (
        lambda m: None,
        lambda m: setattr(m[1], "pad", (3, 3)),
        lambda m: setattr(m[1], "kernel", kernel),
        lambda m: setattr(m[1], "down", 2),
        lambda m: setattr(m[2], "scale", 0.5),
        lambda m: setattr(m[2], "slope", 0.3),
    )
    for change in changes:
        change(plain), change(fast)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=1e-13, atol=1e-13)
