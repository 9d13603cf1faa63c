"""gnn.ReLU and gnn.LeakyReLU do as torch's do, in place too; BiasAct and BiasActPixelNorm."""

import pytest
import torch
from torch import nn
from torch.autograd import grad

import gankern.functional as GF
import gankern.nn as gnn
from gankern.core import native

PAIRS = [
    (gnn.ReLU, nn.ReLU, ()),
    (gnn.LeakyReLU, nn.LeakyReLU, ()),
    (gnn.LeakyReLU, nn.LeakyReLU, (0.3,)),
    (gnn.LeakyReLU, nn.LeakyReLU, (-0.3,)),
]


def both(ours, theirs, arguments, inplace):
    return [cls(*arguments, inplace=inplace) for cls in (ours, theirs)]


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS)
def test_is_torch_s(ours, theirs, arguments):
    for inplace in (False, True):
        mine, right = both(ours, theirs, arguments, inplace)
        assert repr(mine) == repr(right) and isinstance(mine, theirs)
        for x in (torch.randn(3, 4), torch.randn(3, 4, 2, 2)[:, ::2], torch.tensor(2.0), torch.zeros(0, 3)):
            y, z = x.clone(), x.clone()
            torch.testing.assert_close(mine(y), right(z))
            torch.testing.assert_close(y, z)
            assert (mine(y) is y) == (right(z) is z) == inplace


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS[:3])
def test_in_place(ours, theirs, arguments):
    out = []
    for module in both(ours, theirs, arguments, True):
        torch.manual_seed(0)
        x = torch.randn(3, 4, requires_grad=True)
        z = x * 2
        version = z._version
        y = module(z)
        assert y is z and z._version == version + 1
        y = y + 0
        part = y[1:]
        assert module(part).data_ptr() == part.data_ptr()
        out.append((y.detach(), grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(*out)


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS)
def test_in_place_refusals(ours, theirs, arguments):
    for module in both(ours, theirs, arguments, True):
        leaf = torch.randn(3, requires_grad=True)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            module(leaf)
        with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
            module(leaf[1:])
        # exp needs its result
        y = leaf.exp()
        module(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation|negative slope"):
            y.sum().backward()
        # so does the activation
        y = module(leaf * 1)
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation|negative slope"):
            y.sum().backward()
        with pytest.raises(RuntimeError, match="single memory location"):
            module(torch.zeros(1).expand(3))
        with torch.no_grad():
            x = torch.randn(3)
            version = x._version
            module(x)
            assert x._version == version + 1
            assert module(leaf) is leaf
        with torch.inference_mode():
            module(torch.randn(3))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("module", [gnn.ReLU, gnn.LeakyReLU])
def test_no_second_derivative(module, inplace):
    x, g = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    z = x * 1
    y = module(inplace=inplace)(z)
    (dx,) = grad(y, x, g, create_graph=True)
    second = grad(dx.square().sum(), (z, g), allow_unused=True, retain_graph=True)
    if not native.NATIVE_MISSING:
        assert second[0] is None  # within the graph; a leaf has zeros, as torch's
        assert not grad(dx.square().sum(), x)[0].any()
    torch.testing.assert_close(second[1], 2 * dx.detach() * grad(nn.Module.__call__(module(), x).sum(), x)[0])


def test_modules_with_a_bias():
    for module, function in ((gnn.BiasAct, GF.bias_act), (gnn.BiasActPixelNorm, GF.bias_act_pixel_norm)):
        layer = module(5, "leaky_relu", negative_slope=0.1, gain=1.3, dtype=torch.float64)
        assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"bias": (5,)}
        assert not layer.bias.any() and "leaky_relu" in repr(layer)
        nn.init.normal_(layer.bias)
        x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
        right = function(x, layer.bias, activation="leaky_relu", negative_slope=0.1, gain=1.3)
        torch.testing.assert_close(layer(x), right)
        assert module(5, bias=False).bias is None and module(5, bias=False)(x).shape == x.shape
        with pytest.raises(ValueError, match=rf"{module.__name__}: x has shape \(2, 4\); it must be \[N, 5, ...\]"):
            layer(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="num_channels is 0"):
            module(0)
    with pytest.raises(ValueError, match="activation is 'gelu'; accepted are 'linear'"):
        gnn.BiasAct(3, "gelu")
