"""How near an image is to the one it should be: PSNR and SSIM, with everything said that the numbers depend on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern.core.arguments import floats, whole
from gankern.core.names import look_up
from gankern.metrics._checks import check_finite, check_same, check_samples

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales, the finest first


def luma(images: Tensor) -> Tensor:
    """Y of BT.601 as 8-bit video has it: [N, 3, H, W] of 0 to 255 -> [N, 1, H, W] of 16 to 235; grey images likewise.

    16 + (65.481 R + 128.553 G + 24.966 B) / 255, which MATLAB's rgb2ycbcr computes and super-resolution is judged by.

    Raises: TypeError for what is no tensor of floating-point numbers, ValueError for another shape.

    >>> luma(torch.full((1, 3, 1, 1), 255.0)).item()
    235.0
    """
    floats("luma: images", images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"luma: images must be [N, C, H, W] with C 1 or 3, got {tuple(images.shape)}")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=images.dtype, device=images.device) / 255.0
    if images.shape[1] == 1:
        return 16.0 + weights.sum() * images
    return 16.0 + torch.einsum("nchw,c->nhw", images, weights)[:, None]


CHANNELS = {"luma": luma, "all": lambda images: images}


def _prepared(function: str, images: Tensor, reference: Tensor, channels: str, border: int, rounded: bool) -> list:
    """Both as fp64 values of 0 to 255, of the channels and pixels that count."""
    take = look_up(CHANNELS, channels, f"{function}: choice of channels")
    border = whole(f"{function}: border", border, least=0)
    lengths = [len(x) for x in (images, reference) if isinstance(x, Tensor) and x.ndim]
    if len(set(lengths)) > 1:  # one would be held against all
        raise ValueError(f"{function}: images and reference must be as many, got {lengths[0]} and {lengths[1]}")
    prepared = []
    for name, values in (("images", images), ("reference", reference)):
        check_samples(function, name, values)
        if not isinstance(values, Tensor) or values.ndim != 4 or values.shape[1] not in (1, 3):
            raise ValueError(f"{function}: {name} must be [N, C, H, W] with C 1 or 3, got {tuple(values.shape)}")
        floats(f"{function}: {name}", values)
        check_same(function, reference, images)
        check_finite(function, name, values)
        levels = (values.detach().double().clamp(-1.0, 1.0) + 1.0) * 127.5
        levels = take(levels.round() if rounded else levels)
        if 2 * border >= min(levels.shape[2:]):
            raise ValueError(f"{function}: a border of {border} leaves nothing of {tuple(levels.shape[2:])}")
        prepared.append(levels[:, :, border : levels.shape[2] - border, border : levels.shape[3] - border])
    return prepared


def psnr(images: Tensor, reference: Tensor, *, channels: str = "luma", border: int = 0, rounded: bool = True) -> Tensor:
    """The peak signal-to-noise ratio of each image, in dB: 10·log₁₀(255² / mean (x − y)²); [N], fp64.

    A figure needs four statements, and two of them are not the metric's to make alone:

    - ``channels``: "luma" is Y of BT.601 in 16 to 235, as super-resolution is judged (a Y of 0 to 255 would give about
      1.3 dB less); "all" is the mean over all channels.
    - ``border``: so many pixels at each edge are left out; papers leave out as many as the magnification.
    - ``rounded``: images are rounded to 8 bits, as they would be in a file.
    - How the small images were made: with an antialiased bicubic filter of a = −0.5, MATLAB's, which is
      ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``; ``antialias=False`` has a = −0.75.

    Args:
        images, reference: [N, C, H, W] in [−1, 1], C 1 or 3; what lies outside is clamped.

    Infinite where both are equal. Raises ValueError, TypeError: naming the argument.

    >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 20 / 127.5), channels="all")
    tensor([22.1102], dtype=torch.float64)
    """
    x, y = _prepared("psnr", images, reference, channels, border, rounded)
    return 10.0 * torch.log10(255.0**2 / (x - y).square().flatten(1).mean(1))


def ssim(images: Tensor, reference: Tensor, *, channels: str = "luma", border: int = 0, rounded: bool = True) -> Tensor:
    """The structural similarity of each image (Wang 2004): 1 where both are equal; [N], fp64.

    The mean, over channels and all places of an 11×11 Gaussian window of σ 1.5 that lies within the image, of

        (2 μ_x μ_y + c₁)(2 σ_xy + c₂) / ((μ_x² + μ_y² + c₁)(σ_x² + σ_y² + c₂)),   c₁ = (0.01·255)², c₂ = (0.03·255)²

    with the window's weighted means, variances and covariance (no sample correction). Arguments are those of
    :func:`psnr`; images must be at least 11 pixels high and wide, less the border.

    >>> ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    tensor([1.], dtype=torch.float64)
    """
    x, y = _prepared("ssim", images, reference, channels, border, rounded)
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"ssim: images must be at least {WINDOW}x{WINDOW} less the border, got {tuple(x.shape[2:])}")
    luminance, contrast = _similarities(x, y)
    return (luminance * contrast).flatten(1).mean(1)


def ms_ssim(
    images: Tensor, reference: Tensor, *, scales: int | None = None, channels: str = "luma", border: int = 0,
    rounded: bool = True,
) -> Tensor:  # fmt: skip
    r"""The multi-scale structural similarity of each image (Wang 2003): 1 where both are equal; [N], fp64.

    Images are halved M - 1 times, by means of 2×2 pixels. With l and cs the two factors of :func:`ssim`, means and
    variances, it is

    .. math:: \overline{l_M\, cs_M}^{\,w_M} \prod_{j < M} \overline{cs_j}^{\,w_j},
        \quad w = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333),

    a bar the mean over channels and places. A mean below 0, of images that are each other's negative, counts as 0.

    Source: Wang, Simoncelli & Bovik 2003, "Multiscale structural similarity for image quality assessment", section 3.

    Args:
        scales: M, from 1 to 5. None: as many as leave the window of 11×11 room, 5 from 176 pixels on. The weights of
            fewer are taken in proportion, so that they add up to 1; one is :func:`ssim`. Figures of different numbers
            of scales do not compare.

    Other arguments and errors are those of :func:`psnr`.

    >>> ms_ssim(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))
    tensor([1.], dtype=torch.float64)
    """
    x, y = _prepared("ms_ssim", images, reference, channels, border, rounded)
    smallest = min(x.shape[2:])
    room = max((m for m in range(1, len(WEIGHTS) + 1) if smallest >> (m - 1) >= WINDOW), default=0)
    if not room:
        raise ValueError(
            f"ms_ssim: images must be at least {WINDOW}x{WINDOW} less the border, got {tuple(x.shape[2:])}"
        )
    scales = room if scales is None else whole("ms_ssim: scales", scales, 1, len(WEIGHTS))
    if scales > room:
        raise ValueError(f"ms_ssim: scales must be at most {room} for images of {tuple(x.shape[2:])}, got {scales}")
    found = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for j, weight in enumerate(WEIGHTS[:scales]):
        luminance, contrast = _similarities(x, y)
        similarity = contrast if j < scales - 1 else luminance * contrast
        found = found * similarity.flatten(1).mean(1).clamp(min=0.0) ** (weight / sum(WEIGHTS[:scales]))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return found


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of SSIM at each place of the window: of means, and of variances and covariance."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    taps = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    taps = taps / taps.sum()

    def smooth(z: Tensor) -> Tensor:
        single = z.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(single, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1)).unflatten(0, z.shape[:2])

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x * mean_x, smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255.0) ** 2, (K2 * 255.0) ** 2
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1), (2 * covariance + c2) / (var_x + var_y + c2)
