"""The ICNR initialisation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gankern.nn as gnn


@pytest.mark.parametrize("factor", [2, 3])
def test_icnr_makes_the_first_output_nearest_neighbour_upsampling(factor):
    layer = gnn.SubpixelConv2d(5, 4, 3, factor, padding=1)
    x = torch.randn(2, 5, 6, 7)
    low = F.conv2d(x, layer.weight[:: factor**2], layer.bias[:: factor**2], padding=1)
    torch.testing.assert_close(layer(x), F.interpolate(low, scale_factor=factor))
    plain = gnn.SubpixelConv2d(5, 4, 3, factor, padding=1, icnr=False)(x)
    assert not torch.allclose(plain[..., ::factor, ::factor], plain[..., 1::factor, ::factor])


def test_icnr_with_an_initialiser_of_ones_own():
    weight = torch.empty(8, 3, 3, 3)
    assert gnn.init.icnr_(weight, 2, lambda w: nn.init.normal_(w, 0, 5)) is weight
    assert torch.equal(weight[0], weight[3]) and not torch.equal(weight[0], weight[4])
    assert 3 < weight.std() < 7
    with pytest.raises(
        ValueError, match=r"icnr_: weight has shape \(6, 3\); its first dimension must be a multiple of 4"
    ):
        gnn.init.icnr_(torch.empty(6, 3))
    with pytest.raises(ValueError, match="icnr_: upscale_factor is 0"):
        gnn.init.icnr_(weight, 0)


@pytest.mark.parametrize(("dimensions", "convolution"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_icnr_in_any_number_of_dimensions(dimensions, convolution, factor):
    """The phases of a channel are equal, the channels are not, and each is as the initialiser drew it."""
    phases, drawn = factor**dimensions, []

    def initializer(weight):
        drawn.append(nn.init.normal_(weight).clone())

    weight = convolution(4, 5 * phases, 3, bias=False).weight
    gnn.init.icnr_(weight, factor, initializer)
    assert torch.equal(weight.unflatten(0, (5, phases)), drawn[0][:, None].expand(-1, phases, *drawn[0].shape[1:]))


def test_icnr_refuses_what_no_pixel_shuffle_follows():
    with pytest.raises(ValueError, match=r"first dimension must be a multiple of 8, upscale_factor to the power of 3"):
        gnn.init.icnr_(torch.empty(12, 2, 3, 3, 3), 2)
    for shape in ((8,), (8, 2, 3, 3, 3, 3)):
        with pytest.raises(ValueError, match="convolution in 1, 2 or 3 dimensions"):
            gnn.init.icnr_(torch.empty(shape), 2)
    for wrong in (None, [1.0], torch.empty(4, 2, 3, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="icnr_: weight must"):
            gnn.init.icnr_(wrong, 2)
    with pytest.raises(ValueError, match="upscale_factor is True"):
        gnn.init.icnr_(torch.empty(4, 2, 3, 3), True)
    with pytest.raises(TypeError, match="initializer must be a function"):
        gnn.init.icnr_(torch.empty(4, 2, 3, 3), 2, None)
