"""The networks of pix2pix, CycleGAN and SRGAN: parameter counts of the papers, both sets of layers, sizes."""

import pytest
import torch
from torch import nn

from gankern.models.cyclegan import translator
from gankern.models.pix2pix import UNet, patchgan
from gankern.models.srgan import discriminator, srresnet

LAYERS = ("torch", "gankern")
COUNTS = [
    (lambda layers: UNet(layers=layers), 54_414_019),
    (lambda layers: patchgan(6, layers=layers), 2_768_705),
    (lambda layers: UNet(1, 3, (16, 32, 64, 64), 1, layers=layers), 256_179),
    (lambda layers: patchgan(4, 16, 1, layers=layers), 9_809),
    (lambda layers: translator(layers=layers), 11_378_179),
    (lambda layers: translator(blocks=6, layers=layers), 7_837_699),
    (lambda layers: patchgan(3, norm="instance", layers=layers), 2_764_737),
    (lambda layers: translator(3, 16, 3, layers=layers), 272_515),
    (lambda layers: patchgan(3, 16, 2, "instance", layers), 42_865),
    (lambda layers: discriminator(layers=layers), 23_563_649),
    (lambda layers: discriminator(48, 3, 8, 64, layers), 110_833),
]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("make", "count"), COUNTS, ids=[str(count) for _, count in COUNTS])
def test_parameter_counts(make, count, layers):
    with torch.device("meta"):
        assert sum(p.numel() for p in make(layers).parameters()) == count


@pytest.mark.parametrize("layers", LAYERS)
def test_parameter_counts_of_srresnet(layers):
    assert sum(p.numel() for p in srresnet(layers=layers).parameters()) == 1_547_350
    assert sum(p.numel() for p in srresnet(3, 16, 4, layers).parameters()) == 47_386


NETWORKS = {
    "unet": (lambda layers: UNet(2, 3, (4, 8, 8), 0, layers=layers), (2, 2, 16, 24)),
    "unet, instance norm": (lambda layers: UNet(2, 3, (4, 8, 8), 0, "instance", layers), (1, 2, 16, 24)),
    "patchgan": (lambda layers: patchgan(3, 4, 2, layers=layers), (2, 3, 32, 32)),
    "pixels": (lambda layers: patchgan(3, 4, 0, layers=layers), (2, 3, 8, 8)),
    "translator": (lambda layers: translator(3, 4, 2, layers=layers), (1, 3, 16, 20)),
    "translator, nearest": (lambda layers: translator(3, 4, 1, "nearest", layers), (1, 3, 16, 20)),
    "srresnet": (lambda layers: srresnet(3, 4, 1, layers), (2, 3, 8, 6)),
    "discriminator": (lambda layers: discriminator(16, 3, 4, 8, layers), (2, 3, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_both_sets_of_layers_compute_the_same(name):
    make, shape = NETWORKS[name]
    results = []
    for layers in LAYERS:
        torch.manual_seed(0)
        network = make(layers).double()
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = network(x)
        g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        results.append((y, network.state_dict(), torch.autograd.grad(y, [x, *network.parameters()], g)))
    (a, kept_a, grads_a), (b, kept_b, grads_b) = results
    assert list(kept_a) == list(kept_b)  # a checkpoint of either is one of the other
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kept_a, kept_b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads_a, grads_b, rtol=1e-9, atol=1e-9)


def test_the_unet_is_the_published_one():
    """Maps are handed over before their LeakyReLU, norms stand before activations: written out with torch's layers."""
    net = UNet(2, 3, (4, 6, 8), 0, layers="torch").double()
    x = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    norm = lambda module, y: nn.functional.batch_norm(y, None, None, module.weight, module.bias, True)  # noqa: E731
    leaky, relu = (lambda y: nn.functional.leaky_relu(y, 0.2)), torch.relu
    first = net.down[0][0](x)
    second = norm(net.down[1][1], net.down[1][0](leaky(first)))
    inner = net.inner[0](leaky(second))
    up = norm(net.up[0][1], net.up[0][0](relu(inner)))
    up = norm(net.up[1][1], net.up[1][0](relu(torch.cat([up, second], 1))))
    right = net.last[0](relu(torch.cat([up, first], 1))).tanh()
    torch.testing.assert_close(net(x), right)


def test_receptive_fields():
    for strided, pixels in ((1, 16), (2, 34), (3, 70)):
        net = patchgan(1, 2, strided).eval()  # running statistics: a logit depends on what it sees alone
        x = torch.randn(1, 1, 128, 128, requires_grad=True)
        y = net(x)
        middle = y.shape[2] // 2
        (g,) = torch.autograd.grad(y[0, 0, middle, middle], x)
        rows = g[0, 0].abs().sum(1).nonzero()
        assert int(rows.max() - rows.min()) + 1 == pixels


def test_subpixel_layers_start_without_a_checkerboard():
    net = srresnet(3, 8, 1)
    convolution = next(m for m in net if isinstance(m, nn.Conv2d) and m.out_channels == 32)
    y = nn.functional.pixel_shuffle(convolution(torch.randn(1, 8, 6, 6)), 2)
    torch.testing.assert_close(y[:, :, ::2, ::2], y[:, :, 1::2, 1::2])


BAD = [
    (lambda: UNet(3, 3, (4, 8, 8))(torch.ones(1, 3, 20, 24)), r"UNet: x has shape .*multiples of 8"),
    (lambda: UNet(3, 3, (4, 8, 8))(torch.ones(3, 16, 16)), r"UNet: x has shape \(3, 16, 16\)"),
    (lambda: UNet(3, 3, (4,)), "UNet: widths must be of two levels or more"),
    (lambda: UNet(0), "UNet: in_channels"),
    (lambda: UNet(norm="group"), "unknown norm 'group'"),
    (lambda: patchgan(3, strided=-1), "patchgan: strided"),
    (lambda: translator(3, 4, 1)(torch.ones(1, 3, 18, 16)), "translator: x has shape .*multiples of 4"),
    (lambda: translator(upsample="bilinear"), "translator: upsample is 'bilinear'"),
    (lambda: discriminator(40), "discriminator: size must be a multiple of 16"),
    (lambda: srresnet(width=0), "srresnet: width"),
]


@pytest.mark.parametrize(("call", "says"), BAD, ids=[says for _, says in BAD])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("layers", ["torch", "gankern"])
@pytest.mark.parametrize("channels, width", [(3, 16), (1, 4), (3, 3), (3, 5)])
def test_srresnet_starts_as_bilinear_interpolation(layers, channels, width):
    """Away from the borders, where torch's interpolation repeats pixels and a convolution pads with zeros."""
    small = torch.rand(2, channels, 9, 12)
    with torch.no_grad():
        made = srresnet(channels, width, 2, layers).eval()(small)
    wanted = 2 * torch.nn.functional.interpolate(small, scale_factor=4.0, mode="bilinear") - 1
    torch.testing.assert_close(made[:, :, 4:-4, 4:-4], wanted[:, :, 4:-4, 4:-4], rtol=0, atol=2e-6)


def test_a_srresnet_of_fewer_features_than_channels_starts_too():
    assert srresnet(3, 2, 1)(torch.rand(1, 3, 6, 6)).isfinite().all()
