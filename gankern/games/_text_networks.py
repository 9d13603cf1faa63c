"""The networks of text to image (Reed 2016, arXiv 1605.05396): small ones, the authors', and a widely used form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from gankern.models.layers import Layers
from gankern.nn.coupling import apart


@dataclass(frozen=True)
class Form:
    """A set of networks: features of a text's code, of which so many are projected; residual blocks beside the maps of
    4x4 (and after the generator's first layer up); biases of convolutions; batch norm of the projected codes, of the
    generator and of the discriminator; a 1x1 convolution where image and code have been joined; how many times the
    discriminator's width the generator's is."""

    code: int = 1024
    projected: int = 128
    residual: bool = False
    bias: bool = False
    norm: tuple[bool, bool] = (False, True)
    joined: bool = True
    ratio: int = 1


SMALL = Form(128, 64, norm=(False, False))
AUTHORS = Form(residual=True, bias=True, ratio=2)
PLAIN = Form(norm=(True, True), joined=False)  # widely used: the authors' without residual blocks


def projection(form: Form, norm: bool, layers: Layers) -> nn.Sequential:
    """The code of a text -> its features."""
    activation = layers.batch_norm_act_1d(form.projected, 0.2) if norm else layers.leaky_relu(0.2)
    return nn.Sequential(layers.linear(form.code, form.projected), activation)


@apart
class Residual(nn.Module):
    """ReLU(x + [1x1, 3x3, 3x3](x)), by a quarter of the channels."""

    def __init__(self, channels: int, layers: Layers, slope: float):
        super().__init__()
        few = channels // 4
        self.main = nn.Sequential(
            layers.conv(channels, few, 1), layers.batch_norm_act(few, slope),
            layers.conv(few, few, 3, padding=1), layers.batch_norm_act(few, slope),
            layers.conv(few, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.activation = layers.leaky_relu(slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.main(x))


@apart
class Generator(nn.Module):
    """z [N, latent] and the code of a text -> images, by transposed 4x4 convolutions from 4x4 on."""

    def __init__(self, size: int, channels: int, latent: int, width: int, form: Form, layers: Layers):
        super().__init__()
        self.text = projection(form, form.norm[0], layers)
        inputs = latent + form.projected
        maps = [width << i for i in reversed(range(size.bit_length() - 3))]
        modules: list[nn.Module] = [nn.Unflatten(1, (inputs, 1, 1))]
        for i, (before, after) in enumerate(pairwise([inputs, *maps, channels])):
            modules.append(layers.conv_transpose(before, after, 4, 2 if i else 1, 1 if i else 0, bias=form.bias))
            modules.append(layers.batch_norm_act(after) if i < len(maps) else nn.Tanh())
            if form.residual and i < 2:
                modules.append(Residual(after, layers, 0.0))
        self.main = nn.Sequential(*modules)

    def forward(self, latents: Tensor, codes: Tensor) -> Tensor:
        return self.main(torch.cat([latents, self.text(codes)], 1))


@apart
class Discriminator(nn.Module):
    """Images and codes of texts -> logits [N]; the code joins the map of 4x4. ``spectral``: spectral norm of all
    weights in the place of batch norm."""

    def __init__(self, size: int, channels: int, width: int, form: Form, layers: Layers, spectral: bool = False):
        super().__init__()

        def act(maps: int) -> nn.Module:
            return layers.leaky_relu(0.2) if spectral else layers.batch_norm_act(maps, 0.2)

        maps = [width << i for i in range(size.bit_length() - 3)]
        modules: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise([channels, *maps])):
            modules.append(layers.conv(before, after, 4, 2, 1, bias=form.bias))
            modules.append(act(after) if i else layers.leaky_relu(0.2))
        last = maps[-1]
        self.image = nn.Sequential(*modules, *([Residual(last, layers, 0.2)] if form.residual else []))
        self.text = projection(form, form.norm[1] and not spectral, layers)
        both = last + form.projected
        joined = [layers.conv(both, last, 1, bias=form.bias), act(last)] if form.joined else []
        logit = layers.conv(last if form.joined else both, 1, 4, bias=form.bias)
        self.both = nn.Sequential(*joined, logit, nn.Flatten(0))

    def forward(self, images: Tensor, codes: Tensor, features: Tensor | None = None) -> Tensor:
        """``features`` are ``image(images)``, where several texts are held against the same images."""
        tiled = self.text(codes)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.both(torch.cat([self.image(images) if features is None else features, tiled], 1))
