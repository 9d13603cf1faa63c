"""The one switch between stock PyTorch and gankern: a table of layer constructors.

A model is written once, against a ``Layers`` record. Both records make modules of the same names, parameters,
random draws and state_dict keys, so a checkpoint moves freely between them and a comparison of the two
measures the kernels and nothing else.

The torch column is what people write: torch's own modules, and where torch has none (pixel norm, minibatch standard
deviation, equalised learning rate, ...) the shortest formulation in torch operations, with what eager PyTorch can do in
place done in place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations
from torch import Tensor, nn

import gankern.functional as GF
import gankern.nn as gnn
import gankern.nn.utils.parametrizations
from gankern.core.names import look_up
from gankern.nn.coupling import apart, coupled
from gankern.nn.utils import group_spectral_norm

PIXEL_NORM_EPS = 1e-8


# ------------------------------------------------------------------------------------------------------------
# The torch column, where torch.nn has no such module


@coupled
class MinibatchDiscrimination(gnn.MinibatchDiscrimination):
    """Parameters and options of gnn.MinibatchDiscrimination, computed as published: with an [N, N, B, C] tensor."""

    def forward(self, x: Tensor) -> Tensor:
        m = (x @ self.kernel().flatten(1)).unflatten(1, (self.num_kernels, self.kernel_dim))
        similarity = (-(m[:, None] - m[None]).abs().sum(3)).exp().sum(1) - 1.0
        return torch.cat([x, similarity], 1)


@apart
class UpsampleConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then the convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


@apart
class ConvDownsample2d(nn.Conv2d):
    """The convolution, then the mean of each 2×2 pixels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(super().forward(x), 2)


class _Activated(nn.Module):
    """The norm behind it in the list of bases, then a leaky ReLU; ReLU at slope 0, nothing at None."""

    def __init__(self, channels: int, negative_slope: float | None = 0.0, **norm: float):
        super().__init__(channels, **norm)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.negative_slope is None else F.leaky_relu(x, self.negative_slope, inplace=True)


@apart
class BatchNormAct1d(_Activated, nn.BatchNorm1d):
    """Batch norm of features [N, C], then a leaky ReLU."""


@apart
class BatchNormAct2d(_Activated, nn.BatchNorm2d):
    """Batch norm, then a leaky ReLU."""


@apart
class InstanceNormAct2d(_Activated, nn.InstanceNorm2d):
    """Instance norm without weights, then a leaky ReLU."""


@apart
class BatchNormPReLU2d(nn.BatchNorm2d):
    """Batch norm, then a PReLU of one slope, ``slope``."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.slope = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(super().forward(x), self.slope)


@apart
class BiasAct(nn.Module):
    """A bias for each channel, then an activation by its name in torch.nn.functional."""

    def __init__(self, channels: int, activation: str):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.activation = getattr(F, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.bias.view(-1, *(1 for _ in x.shape[2:])))


@apart
class ConditionalBatchNormAct2d(nn.BatchNorm2d):
    """Batch norm whose scale and shift are looked up by label, then ReLU (Dumoulin 2017, arXiv 1610.07629)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(channels, affine=False)
        self.weight = nn.Parameter(torch.ones(num_classes, channels))
        self.bias = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]  # it has an argument more
        x = F.batch_norm(
            x, self.running_mean, self.running_var, training=self.training, momentum=self.momentum or 0.0, eps=self.eps
        )
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        scale, shift = self.weight[labels][:, :, None, None], self.bias[labels][:, :, None, None]
        return F.relu(x * scale + shift, inplace=True)


@apart
class LinearBatchNormReLU2d(nn.BatchNorm2d):
    """Batch norm whose scale and shift are linear maps of a vector, then ReLU (Brock 2018, arXiv 1809.11096)."""

    def __init__(self, channels: int, condition: int):
        super().__init__(channels, affine=False)
        self.gain, self.shift = (nn.Linear(condition, channels, bias=False) for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]  # it has an argument more
        x = super().forward(x)
        return F.relu(x * (1 + self.gain(c))[:, :, None, None] + self.shift(c)[:, :, None, None], inplace=True)


@apart
class EqualizedLinear(nn.Linear):
    """Weights ~ N(0, 1), multiplied by gain/√fan_in at run time."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, gain: float = math.sqrt(2)):
        super().__init__(in_features, out_features, bias)
        _standard_normal(self)
        self.scale = gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


@apart
class EqualizedConv2d(nn.Conv2d):
    """Weights ~ N(0, 1), multiplied by gain/√fan_in at run time."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0, gain: float = math.sqrt(2)
    ):
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        _standard_normal(self)
        self.scale = gain / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


def _standard_normal(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@apart
class PixelNorm(nn.Module):
    """x / √(mean over the channels of x² + 1e-8)."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x)


def pixel_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + PIXEL_NORM_EPS)


@apart
class PixelNormDense(nn.Module):
    """ProGAN's first layer: [N, in_features] → [N, channels, 4, 4] → bias → leaky ReLU 0.2 → pixel norm.

    The weight is that of a transposed 4×4 convolution, drawn from N(0, 1) and multiplied by (√2/4)/√in_features.
    """

    def __init__(self, in_features: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, channels, 4, 4))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = math.sqrt(2) / 4 / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        maps = (x @ (self.weight * self.scale).flatten(1)).view(-1, *self.weight.shape[1:])
        return self.tail(maps)

    def tail(self, x: Tensor) -> Tensor:
        return pixel_norm(F.leaky_relu(x + self.bias[:, None, None], 0.2, inplace=True))


@apart
class PixelNormConv(nn.Module):
    """ProGAN's generator layer: [nearest ×2 →] equalised 3×3 → bias → leaky ReLU 0.2 → pixel norm."""

    def __init__(self, in_channels: int, out_channels: int, upsample: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.scale = math.sqrt(2) / math.sqrt(9 * in_channels)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.conv2d(x, self.weight * self.scale, self.bias, padding=1)
        return pixel_norm(F.leaky_relu(x, 0.2, inplace=True))


@apart
class SelfAttention2d(gnn.SelfAttention2d):
    """Parameters of gnn.SelfAttention2d, computed as published, with the whole table."""

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.theta(x), F.max_pool2d(self.phi(x), 2), F.max_pool2d(self.g(x), 2)
        table = torch.bmm(queries.flatten(2).mT, keys.flatten(2)).softmax(2)
        found = torch.bmm(values.flatten(2), table.mT).view(-1, values.shape[1], *x.shape[2:])
        return x + self.gamma * self.out(found)


@coupled
class MinibatchStdDev(nn.Module):
    """One more channel: the standard deviation over a group of samples, averaged (Karras 2018, §3)."""

    def __init__(self, group_size: int = 4):
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        samples, _, height, width = x.shape
        group = min(self.group_size, samples)
        if samples % group:
            raise ValueError(f"MinibatchStdDev: batch of {samples} is not divisible by group_size {group}")
        groups = x.reshape(group, samples // group, -1)  # sample i is in group i mod (N/G)
        deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean(1)
        return torch.cat([x, deviation.repeat(group)[:, None, None, None].expand(-1, 1, height, width)], 1)


# ------------------------------------------------------------------------------------------------------------
# The gankern column, where gankern.nn has the operations but not the module


def _act(negative_slope: float | None) -> dict:
    if negative_slope is None:
        return {"activation": None}
    return {"activation": "leaky_relu" if negative_slope else "relu", "negative_slope": negative_slope}


def batch_norm_act(channels: int, negative_slope: float | None = 0.0, eps: float = 1e-5) -> nn.Module:
    return gnn.BatchNormAct2d(channels, eps=eps, **_act(negative_slope))


def instance_norm_act(channels: int, negative_slope: float | None = 0.0) -> nn.Module:
    return gnn.InstanceNormAct2d(channels, **_act(negative_slope))


def batch_norm_prelu(channels: int) -> nn.Module:
    return gnn.BatchNormAct2d(channels, activation="prelu")


def batch_norm_act_1d(channels: int, negative_slope: float = 0.0, eps: float = 1e-5) -> nn.Module:
    return gnn.BatchNormAct1d(channels, eps=eps, **_act(negative_slope))


def virtual_batch_norm_act(channels: int, negative_slope: float = 0.0, implementation: str | None = None) -> nn.Module:
    return gnn.VirtualBatchNorm2d(channels, **_act(negative_slope), implementation=implementation)


# Norms that are given a condition beside x: labels, or vectors.
CONDITIONAL = (ConditionalBatchNormAct2d, gnn.ConditionalBatchNorm2d, LinearBatchNormReLU2d, gnn.LinearBatchNorm2d)


class _FusedTail:
    """Bias, leaky ReLU and pixel norm in one pass."""

    bias: nn.Parameter

    def tail(self, x: Tensor) -> Tensor:
        return GF.bias_act_pixel_norm(x, self.bias, activation="leaky_relu", negative_slope=0.2)


@apart
class FusedPixelNormDense(_FusedTail, PixelNormDense):
    pass


@apart
class FusedPixelNormConv(_FusedTail, PixelNormConv):
    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            return self.tail(GF.upsample_conv2d(x, self.weight, weight_scale=self.scale))
        return self.tail(GF.conv2d(x, self.weight, padding=1, weight_scale=self.scale))


# ------------------------------------------------------------------------------------------------------------
# The table


def _layer_by_layer(network: nn.Module) -> nn.Module:
    return network


@dataclass(frozen=True)
class Layers:
    """Constructors, with the arguments of their torch namesakes where torch has one.

    ``spectral_norm(layer)`` normalises a layer's weight. ``group_spectral_norm(network)`` is called once on a
    complete network that has such layers: it may change how they are computed, never what they compute.
    """

    name: str
    linear: Callable[..., nn.Module]
    conv: Callable[..., nn.Module]
    conv_transpose: Callable[..., nn.Module]
    upsample_conv: Callable[..., nn.Module]
    conv_downsample: Callable[..., nn.Module]
    relu: Callable[..., nn.Module]
    leaky_relu: Callable[..., nn.Module]
    bias_act: Callable[..., nn.Module]
    batch_norm_act: Callable[..., nn.Module]
    batch_norm_act_1d: Callable[..., nn.Module]
    batch_norm_prelu: Callable[..., nn.Module]
    instance_norm_act: Callable[..., nn.Module]
    prelu: Callable[..., nn.Module]
    linear_batch_norm_relu: Callable[..., nn.Module]
    virtual_batch_norm_act: Callable[..., nn.Module]
    conditional_batch_norm_act: Callable[..., nn.Module]
    equalized_linear: Callable[..., nn.Module]
    equalized_conv: Callable[..., nn.Module]
    pixel_norm: Callable[..., nn.Module]
    pixel_norm_dense: Callable[..., nn.Module]
    pixel_norm_conv: Callable[..., nn.Module]
    self_attention: Callable[..., nn.Module]
    mean_of_four: Callable[[], nn.Module]
    minibatch_stddev: Callable[..., nn.Module]
    minibatch_discrimination: Callable[..., nn.Module]
    spectral_norm: Callable[[nn.Module], nn.Module]
    group_spectral_norm: Callable[[nn.Module], nn.Module]


TORCH = Layers(
    name="torch",
    linear=nn.Linear,
    conv=nn.Conv2d,
    conv_transpose=nn.ConvTranspose2d,
    upsample_conv=UpsampleConv2d,
    conv_downsample=ConvDownsample2d,
    relu=nn.ReLU,
    leaky_relu=nn.LeakyReLU,
    bias_act=BiasAct,
    batch_norm_act=BatchNormAct2d,
    batch_norm_act_1d=BatchNormAct1d,
    batch_norm_prelu=BatchNormPReLU2d,
    instance_norm_act=InstanceNormAct2d,
    prelu=nn.PReLU,
    linear_batch_norm_relu=LinearBatchNormReLU2d,
    # How the network's reference batch comes through the layers is not for every model to write again; the arithmetic
    # is plain PyTorch.
    virtual_batch_norm_act=partial(virtual_batch_norm_act, implementation="reference"),
    conditional_batch_norm_act=ConditionalBatchNormAct2d,
    equalized_linear=EqualizedLinear,
    equalized_conv=EqualizedConv2d,
    pixel_norm=PixelNorm,
    pixel_norm_dense=PixelNormDense,
    pixel_norm_conv=PixelNormConv,
    self_attention=SelfAttention2d,
    mean_of_four=partial(nn.AvgPool2d, 2),
    minibatch_stddev=MinibatchStdDev,
    minibatch_discrimination=MinibatchDiscrimination,
    spectral_norm=torch.nn.utils.parametrizations.spectral_norm,
    group_spectral_norm=_layer_by_layer,
)

GANKERN = replace(
    TORCH,
    name="gankern",
    conv=gnn.Conv2d,
    conv_transpose=gnn.ConvTranspose2d,
    upsample_conv=gnn.UpsampleConv2d,
    conv_downsample=gnn.ConvDownsample2d,
    relu=gnn.ReLU,
    leaky_relu=gnn.LeakyReLU,
    bias_act=gnn.BiasAct,
    batch_norm_act=batch_norm_act,
    batch_norm_act_1d=batch_norm_act_1d,
    batch_norm_prelu=batch_norm_prelu,
    instance_norm_act=instance_norm_act,
    prelu=gnn.PReLU,
    linear_batch_norm_relu=partial(gnn.LinearBatchNorm2d, activation="relu"),
    conditional_batch_norm_act=partial(gnn.ConditionalBatchNorm2d, activation="relu"),
    virtual_batch_norm_act=virtual_batch_norm_act,
    equalized_linear=gnn.EqualizedLinear,
    equalized_conv=gnn.EqualizedConv2d,
    pixel_norm=gnn.PixelNorm,
    pixel_norm_dense=FusedPixelNormDense,
    pixel_norm_conv=FusedPixelNormConv,
    self_attention=gnn.SelfAttention2d,
    mean_of_four=partial(gnn.FIRDownsample2d, 2, "box"),
    minibatch_stddev=gnn.MinibatchStdDev,
    minibatch_discrimination=gnn.MinibatchDiscrimination,
    spectral_norm=gankern.nn.utils.parametrizations.spectral_norm,
    group_spectral_norm=group_spectral_norm,  # on CUDA all layers' weights in one call, once a forward
)

LAYERS = {layers.name: layers for layers in (TORCH, GANKERN)}


def get(name: str) -> Layers:
    """The set of layers of that name; a ValueError with the nearest names if there is none."""
    return look_up(LAYERS, name, "set of layers")


def normalise_spectrally(network: nn.Module, layers: Layers) -> nn.Module:
    """Spectral norm on every convolution, linear layer and embedding of a network."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            layers.spectral_norm(module)
    return layers.group_spectral_norm(network)
