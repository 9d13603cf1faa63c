"""ProGAN: a GAN that grows from 4×4 to 1024×1024 while it trains (Karras 2018, arXiv 1710.10196).

Both networks hold the blocks of all resolutions from the start, and run only those up to the present one:
``resize(resolution, alpha)`` says which that is, and how far its newest block is faded in. Every weight is drawn
from N(0, 1) and scaled at run time (equalised learning rate).
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.models import layers as layer_tables
from gankern.models._record import model
from gankern.models._sizes import check_positive, check_size
from gankern.models.gan import GAN
from gankern.models.layers import Layers
from gankern.nn.coupling import apart

LARGEST = 1024


def channels_at(resolution: int, width: int = 512) -> int:
    """Channels of the feature maps: ``width`` up to 32×32, halved at each doubling after that.

    >>> [channels_at(2**i) for i in range(2, 11)]
    [512, 512, 512, 512, 256, 128, 64, 32, 16]
    """
    return max(1, min(width, 32 * width // resolution))


def fade(images: Tensor, alpha: float) -> Tensor:
    """Real images as the discriminator is to see them while a block of weight ``alpha`` fades in: [N, C, H, W].

    The lerp between the images at half their resolution, upsampled again, and the images.
    """
    if alpha >= 1.0:
        return images
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
    return torch.lerp(coarse, images, alpha)


class _Growing(nn.Module):
    """The present resolution and the weight of its newest block; both are saved with the state_dict."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.resolution = size
        self.alpha = 1.0

    def resize(self, resolution: int, alpha: float = 1.0) -> None:
        """Run at ``resolution``, from 4 to the size that was built, its newest block weighted by ``alpha``."""
        check_size(resolution, 4, self.size)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must be from 0 (old blocks only) to 1 (faded in), got {alpha}")
        self.resolution = resolution
        self.alpha = float(alpha) if resolution > 4 else 1.0

    @property
    def level(self) -> int:
        """Index of the newest block that runs: 0 at 4×4."""
        return self.resolution.bit_length() - 3

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.resolution, self.alpha], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.resize(int(state[0]), float(state[1]))


@apart
class ProGANGenerator(_Growing):
    """[N, latent] → pixel norm → 4×4 → 8×8 → ... → [N, channels, R, R] at the present resolution R.

    The last layer is linear, as in the paper: images are meant to be in [−1, 1], and nothing clips them.
    """

    def __init__(self, size: int, channels: int, latent: int, width: int, layers: Layers):
        super().__init__(size)
        maps = [channels_at(4 << level, width) for level in range(check_size(size, 4, LARGEST) + 1)]
        self.latent_norm = layers.pixel_norm()
        first = nn.Sequential(layers.pixel_norm_dense(latent, maps[0]), layers.pixel_norm_conv(maps[0], maps[0]))
        self.blocks = nn.ModuleList([first])
        for before, after in itertools.pairwise(maps):
            self.blocks.append(
                nn.Sequential(
                    layers.pixel_norm_conv(before, after, upsample=True), layers.pixel_norm_conv(after, after)
                )
            )
        self.to_rgb = nn.ModuleList(layers.equalized_conv(wide, channels, 1, gain=1.0) for wide in maps)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.latent_norm(latents)
        blocks = [*self.blocks]  # a slice of them would be made a module at every call
        for block in blocks[: self.level]:
            x = block(x)
        images = self.to_rgb[self.level](blocks[self.level](x))
        if self.alpha == 1.0:
            return images
        coarse = F.interpolate(self.to_rgb[self.level - 1](x), scale_factor=2, mode="nearest")
        return torch.lerp(coarse.to(images.dtype), images, self.alpha)  # CUDA's autocast interpolates in fp32


@apart
class ProGANDiscriminator(_Growing):
    """[N, channels, R, R] at the present resolution R → ... → 4×4 → minibatch standard deviation → logits [N]."""

    def __init__(self, size: int, channels: int, width: int, layers: Layers):
        super().__init__(size)
        maps = [channels_at(4 << level, width) for level in range(check_size(size, 4, LARGEST) + 1)]

        def conv(before: int, after: int, kernel_size: int, padding: int = 0) -> list[nn.Module]:
            return [
                layers.equalized_conv(before, after, kernel_size, padding=padding),
                layers.leaky_relu(0.2, inplace=True),
            ]

        last = [layers.minibatch_stddev(), *conv(maps[0] + 1, maps[0], 3, 1), *conv(maps[0], maps[0], 4)]
        self.blocks = nn.ModuleList([nn.Sequential(*last)])
        for after, before in itertools.pairwise(maps):
            block = [*conv(before, before, 3, 1), *conv(before, after, 3, 1), nn.AvgPool2d(2)]
            self.blocks.append(nn.Sequential(*block))
        self.from_rgb = nn.ModuleList(nn.Sequential(*conv(channels, wide, 1)) for wide in maps)
        self.head = layers.equalized_linear(maps[0], 1, gain=1.0)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.resolution, self.resolution):
            raise ValueError(
                f"the discriminator runs at {self.resolution}x{self.resolution} now, and got images of "
                f"{images.shape[2]}x{images.shape[3]}: resize one or the other"
            )
        x = self.from_rgb[self.level](images)
        if self.level > 0:
            x = self.blocks[self.level](x)
            if self.alpha < 1.0:
                coarse = self.from_rgb[self.level - 1](F.avg_pool2d(images, 2))
                x = torch.lerp(coarse, x, self.alpha)
        for block in reversed([*self.blocks][: max(self.level, 1)]):
            x = block(x)
        return self.head(x.flatten(1)).flatten()


@model(
    growing=True, loss="wasserstein", latent=64, width=64, lr=1e-3, beta1=0.0, beta2=0.99, ema=0.999,
    gradient_penalty=10.0, drift=1e-3, batch_size=16, grow_steps=150,
)  # fmt: skip
def progan(size: int = 1024, channels: int = 3, latent: int = 512, width: int = 512, layers: str = "torch") -> GAN:
    """ProGAN for images of up to ``size`` × ``size``: 4, 8, ..., 1024. ``width`` is the channels up to 32×32.

    23,079,115 + 23,087,249 parameters at the defaults, with the RGB layers of all resolutions.

    >>> gan = progan(size=32, width=16, latent=8)
    >>> for network in (gan.generator, gan.discriminator):
    ...     network.resize(16, alpha=0.3)
    >>> gan.discriminator(gan.generator(torch.randn(4, 8))).shape
    torch.Size([4])
    """
    check_positive(channels=channels, latent=latent, width=width)
    table = layer_tables.get(layers)
    generator = ProGANGenerator(size, channels, latent, width, table)
    return GAN(generator, ProGANDiscriminator(size, channels, width, table), latent)
