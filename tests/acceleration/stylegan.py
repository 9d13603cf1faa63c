"""The three operations of StyleGAN2 in pure PyTorch, in the two ways in which they are passed around, as tests need
them: with ``x.device.type`` and helpers, and as decorated functions that nobody can read."""

import functools
import math
from collections import abc

import torch
import torch.nn.functional as F
from torch import nn


def leaky_bias(x, bias=None, negative_slope=0.2, scale=2**0.5):
    if x.device.type == "cpu":
        if bias is not None:
            ones = [1] * (x.ndim - bias.ndim - 1)
            return F.leaky_relu(x + bias.view(1, bias.shape[0], *ones), negative_slope=negative_slope) * scale
        return F.leaky_relu(x, negative_slope=negative_slope) * scale
    return NotHere.apply(x, bias)


class NotHere(torch.autograd.Function):
    """Stands for a kernel that is not compiled here."""


class LeakyBias(nn.Module):
    def __init__(self, channels, slope=0.2, scale=2**0.5):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))
        self.slope, self.scale = slope, scale

    def forward(self, x):
        return leaky_bias(x, self.bias, self.slope, self.scale)


class LeakyBiasOfMaps(nn.Module):
    """The bias as [1, C, 1, 1], in place, the factor in front."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x):
        return math.sqrt(2) * F.leaky_relu(x + self.bias, 0.2, inplace=True)


class Scaled(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class ReluClamped(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels))
        self.gain, self.limit = 1.5, 0.9

    def forward(self, x):
        y = F.relu(x + self.bias.reshape([-1 if i == 1 else 1 for i in range(x.ndim)]))
        y = y * self.gain
        return y.clamp(-self.limit, self.limit)


def resample_minor(x, kernel, up_x, up_y, down_x, down_y, pad_x0, pad_x1, pad_y0, pad_y1):
    """With a last dimension of 1 and batch and channels as one."""
    _, channel, in_h, in_w = x.shape
    x = x.reshape(-1, in_h, in_w, 1)
    _, in_h, in_w, minor = x.shape
    kernel_h, kernel_w = kernel.shape
    y = x.view(-1, in_h, 1, in_w, 1, minor)
    y = F.pad(y, [0, 0, 0, up_x - 1, 0, 0, 0, up_y - 1])
    y = y.view(-1, in_h * up_y, in_w * up_x, minor)
    y = F.pad(y, [0, 0, max(pad_x0, 0), max(pad_x1, 0), max(pad_y0, 0), max(pad_y1, 0)])
    y = y[
        :,
        max(-pad_y0, 0) : y.shape[1] - max(-pad_y1, 0),
        max(-pad_x0, 0) : y.shape[2] - max(-pad_x1, 0),
        :,
    ]
    y = y.permute(0, 3, 1, 2)
    y = y.reshape([-1, 1, in_h * up_y + pad_y0 + pad_y1, in_w * up_x + pad_x0 + pad_x1])
    y = F.conv2d(y, torch.flip(kernel, [0, 1]).view(1, 1, kernel_h, kernel_w))
    y = y.reshape(-1, minor, in_h * up_y + pad_y0 + pad_y1 - kernel_h + 1, in_w * up_x + pad_x0 + pad_x1 - kernel_w + 1)
    y = y.permute(0, 2, 3, 1)
    y = y[:, ::down_y, ::down_x, :]
    out_h = (in_h * up_y + pad_y0 + pad_y1 - kernel_h + down_y) // down_y
    out_w = (in_w * up_x + pad_x0 + pad_x1 - kernel_w + down_x) // down_x
    return y.view(-1, channel, out_h, out_w)


def resample(x, kernel, up=1, down=1, pad=(0, 0)):
    if not isinstance(up, abc.Iterable):
        up = (up, up)
    if not isinstance(down, abc.Iterable):
        down = (down, down)
    if len(pad) == 2:
        pad = (pad[0], pad[1], pad[0], pad[1])
    if x.device.type == "cpu":
        return resample_minor(x, kernel, *up, *down, *pad)
    return NotHere.apply(x, kernel)


def resample_grouped(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1):
    """With channels as groups."""
    batch, channels, height, width = x.shape
    x = x.reshape([batch, channels, height, 1, width, 1])
    x = torch.nn.functional.pad(x, [0, up - 1, 0, 0, 0, up - 1])
    x = x.reshape([batch, channels, height * up, width * up])
    x = F.pad(x, [max(padding, 0), max(padding, 0), max(padding, 0), max(padding, 0)])
    x = x[:, :, max(-padding, 0) : x.shape[2] - max(-padding, 0), max(-padding, 0) : x.shape[3] - max(-padding, 0)]
    if not flip_filter:
        f = f.flip([0, 1])
    f = f.unsqueeze(0).unsqueeze(0).repeat([channels, 1, 1, 1])
    x = F.conv2d(input=x, weight=f, groups=channels)
    return x[:, :, ::down, ::down]


def kernel_of(taps, gain=1.0):
    k = torch.tensor(taps, dtype=torch.float32)
    k = k[None, :] * k[:, None]
    return k / k.sum() * gain


class Resample(nn.Module):
    """Up, down or blur, by the options."""

    def __init__(self, function=resample, taps=(1, 3, 2, 1), gain=1.0, **options):
        super().__init__()
        self.register_buffer("kernel", kernel_of(list(taps), gain))
        self.up, self.down, self.pad = options.get("up", 1), options.get("down", 1), options.get("pad", (0, 0))

    def forward(self, x):
        return resample(x, self.kernel, up=self.up, down=self.down, pad=self.pad)


class ResampleGrouped(Resample):
    def forward(self, x):
        return resample_grouped(x, self.kernel, self.up, self.down, self.pad)


class ResampleFlipped(Resample):
    def forward(self, x):
        return resample_grouped(x, self.kernel, self.up, self.down, self.pad, flip_filter=True)


def watched(function):
    """As profilers decorate."""

    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


resample_watched = watched(resample_grouped)


class ResampleWatched(Resample):
    def forward(self, x):
        return resample_watched(x, self.kernel, self.up, self.down, self.pad)
