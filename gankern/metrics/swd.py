"""Sliced Wasserstein distance between patches of Laplacian pyramids (Karras 2018, arXiv 1710.10196, §5).

Small distances at the coarse levels say that large structures are alike, at the fine levels that edges and noise are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core.arguments import floats, shown, whole
from gankern.core.arguments import seed as check_seed
from gankern.data import ImageSource
from gankern.metrics._checks import batches, check_finite, check_same, check_samples

PATCH = 7  # side of a patch
COARSEST = 16  # the pyramid ends at this size
BATCH = 64


def _smooth(images: Tensor, gain: float = 1.0) -> Tensor:
    """The 5×5 binomial filter, edges mirrored."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype, device=images.device) / 16.0
    channels = images.shape[1]
    rows = (gain * taps).view(1, 1, 1, 5).expand(channels, 1, 1, 5)
    columns = (gain * taps).view(1, 1, 5, 1).expand(channels, 1, 5, 1)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, rows, groups=channels), columns, groups=channels)


def laplacian_pyramid(images: Tensor | ImageSource, coarsest: int = COARSEST) -> list[Tensor]:
    """Bands of [N, C, H, W], the finest first: each what is lost by halving the size; the last is what remains.

    >>> [band.shape[-1] for band in laplacian_pyramid(torch.randn(1, 3, 64, 64))]
    [64, 32, 16]
    """
    check_samples("laplacian_pyramid", "images", images)
    images = images if isinstance(images, Tensor) else images[:]
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"laplacian_pyramid: images must be [N, C, H, W] of floating-point numbers, got {shown(images)}"
        )
    # The filter mirrors two pixels at the edges, which smaller images do not have.
    coarsest = whole("laplacian_pyramid: coarsest", coarsest, least=2)
    bands = []
    while min(images.shape[2:]) > coarsest:
        coarse = _smooth(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = coarse
        bands.append(images - _smooth(spread, gain=2.0))  # three in four pixels are zero
        images = coarse
    return [*bands, images]


def _patches(name: str, images: Tensor | ImageSource, number: int, random: torch.Generator) -> list[Tensor]:
    """For each band ``number`` patches an image from random places, [N·number, C, 7, 7]."""
    levels: list[list[Tensor]] = []
    for batch in batches("laplacian_swd", name, images, BATCH):
        for level, band in enumerate(laplacian_pyramid(batch)):
            _, _, height, width = band.shape
            top = torch.randint(height - PATCH + 1, (len(batch), number), generator=random).to(band.device)
            left = torch.randint(width - PATCH + 1, (len(batch), number), generator=random).to(band.device)
            steps = torch.arange(PATCH, device=band.device)
            rows = (top[:, :, None] + steps)[:, :, None, :, None]  # [n, number, 1, 7, 1]
            columns = (left[:, :, None] + steps)[:, :, None, None, :]
            sample = torch.arange(len(batch), device=band.device)[:, None, None, None, None]
            channel = torch.arange(band.shape[1], device=band.device)[None, None, :, None, None]
            if level == len(levels):
                levels.append([])
            levels[level].append(band[sample, channel, rows, columns].flatten(0, 1))
    return [torch.cat(level) for level in levels]


def _normalised(patches: Tensor) -> Tensor:
    """Each channel of mean 0 and standard deviation 1 over all patches; [number, C·49]."""
    mean = patches.mean((0, 2, 3), keepdim=True)
    std = patches.std((0, 2, 3), keepdim=True, correction=0)
    return ((patches - mean) / std.clamp_min(1e-12)).flatten(1)


def sliced_wasserstein(
    real: Tensor, fake: Tensor, projections: int = 512, random: torch.Generator | None = None
) -> float:
    """The mean over random directions of the Wasserstein-1 distance between the projections of [N, D] and [N, D].

    The mean over the directions of the unit sphere; in one dimension the distance is that of the sorted values.

    >>> round(sliced_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[4.0], [2.0]])), 4)
    2.5
    """
    for name, values in (("real", real), ("fake", fake)):
        check_samples("sliced_wasserstein", name, values)
    check_same("sliced_wasserstein", real, fake)
    if len(real.shape) != 2 or len(real) != len(fake) or len(real) == 0:
        raise ValueError(
            f"sliced_wasserstein: real and fake must both be [N, D], got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    for name, values in (("real", real), ("fake", fake)):
        floats(f"sliced_wasserstein: {name}", values)
        check_finite("sliced_wasserstein", name, values)
    projections = whole("sliced_wasserstein: projections", projections, least=1)
    directions = torch.randn(real.shape[1], projections, generator=random, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(real)
    total = 0.0
    for part in directions.split(32, dim=1):  # bounds memory
        gap = (real @ part).sort(0).values - (fake @ part).sort(0).values
        total += gap.abs().mean(0).double().sum().item()
    return total / projections


@torch.no_grad()
def laplacian_swd(
    real: Tensor | ImageSource,
    fake: Tensor | ImageSource,
    patches: int = 128,
    projections: int = 512,
    seed: int = 0,
) -> dict[int, float]:
    """{size of the band: distance × 1000}, the finest first, and so for ProGAN's table: 7×7 patches, 128 an image.

    Args:
        real, fake: as many images each, [N, C, H, W] with H = W a power of two, at least 16; tensors, or sources whose
            images are read as they are needed. The paper has N = 16384;
            with fewer, the distance of two sets of one distribution is farther from 0.
        patches: from each band of each image, at random places.
        projections: random directions in the space of patches, C·49 dimensions.
        seed: of places and directions.

    Each set's patches are normalised to mean 0 and standard deviation 1, a colour channel and band at a time.

    >>> real, fake = torch.rand(2, 8, 3, 32, 32) * 2 - 1
    >>> list(laplacian_swd(real, fake))
    [32, 16]
    """
    for name, images in (("real", real), ("fake", fake)):
        check_samples("laplacian_swd", name, images)
        if isinstance(images, Tensor):
            floats(f"laplacian_swd: {name}", images)
    check_same("laplacian_swd", real, fake)
    if len(real.shape) != 4 or len(real) != len(fake) or len(real) == 0:
        raise ValueError(
            f"laplacian_swd: real and fake must be as many images [N, C, H, W] each, got {tuple(real.shape)} "
            f"and {tuple(fake.shape)}"
        )
    height, width = real.shape[2:]
    if height != width or height < COARSEST or height & (height - 1):
        raise ValueError(f"laplacian_swd: images must be squares of a power of two from 16 up, got {height}x{width}")
    for name, value in (("patches", patches), ("projections", projections)):
        whole(f"laplacian_swd: {name}", value, least=1)
    random = torch.Generator().manual_seed(check_seed("laplacian_swd: seed", seed))
    bands = zip(_patches("real", real, patches, random), _patches("fake", fake, patches, random), strict=True)
    return {
        height >> level: 1000.0 * sliced_wasserstein(_normalised(a), _normalised(b), projections, random)
        for level, (a, b) in enumerate(bands)
    }
