"""Whether a generator makes checkerboard patterns, and which of its layers does.

An upsampling layer treats its output samples differently according to their place modulo the stride, their phase. If
some phases sum more terms than others, noise, features and gradients come out with a grid of that stride in them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gankern.core import extras
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import shown, whole
from gankern.core.evaluation import evaluating
from gankern.core.files import write_bytes

if TYPE_CHECKING:
    from rich.table import Table

CLEAN = 1.05  # the largest ratio of a geometry's phase energies that is called clean
CLEAN_WEIGHTS = 1.25  # of the weights': drawn at random they are never quite even
CLEAN_PATTERN = 0.05
SIZE = 16  # of the feature maps that layers are measured on
DRAWS = 4
BATCH = 8

Map = list[list[float]]


@dataclass
class Stage:
    """One upsampling layer. Maps hold the energy of each output phase, [factor][factor], with mean 1; ratios are that
    of the largest entry over the smallest: 1 is clean."""

    layer: str  # its name in the generator; "" is the generator itself
    kind: str
    factor: int
    overlap: Map | None  # of the layer with all weights equal: what its geometry does
    overlap_ratio: float | None
    energy: Map  # of its response to white noise: what its weights add
    ratio: float
    gradient: Map  # of the gradient of its input, for white noise as gradient of one phase
    gradient_ratio: float
    # Of the response to an input that is constant over space, the share of the energy that alternates between phases:
    # 0 is clean.
    pattern: float
    advice: str | None = None  # None where it is clean

    @property
    def severity(self) -> float:
        """0 is clean."""
        return max((self.overlap_ratio or 1.0) - 1, self.ratio - 1, self.gradient_ratio - 1, self.pattern)


@dataclass
class Report:
    stages: list[Stage]
    factor: int  # of all stages together
    image_energy: Map  # of the images' Laplacian, by phase modulo the factor of the last stage
    image_ratio: float
    # Power of the images at frequencies of the strides over the median power around: period in pixels, (vertical,
    # horizontal) frequency in cycles a pixel, ratio.
    peaks: list[dict[str, Any]]
    culprit: str | None  # the layer with the largest ratio; None where all are clean
    spectrum: Tensor = field(repr=False)  # [H, W], mean power, frequency 0 in the middle

    @property
    def clean(self) -> bool:
        return self.culprit is None

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds: everything but the spectrum."""
        result = {key: value for key, value in vars(self).items() if key not in ("stages", "spectrum")}
        return result | {"clean": self.clean, "stages": [asdict(stage) for stage in self.stages]}

    def table(self) -> Table:
        """The stages as a rich table."""
        from rich.table import Table

        table = Table(title="Upsampling stages: largest over smallest phase energy (1 is clean)")
        for column in ("layer", "kind", "factor", "geometry", "noise", "gradient", "pattern", "what to do"):
            table.add_column(column, justify="left" if column in ("layer", "kind", "what to do") else "right")
        for s in self.stages:
            geometry = "-" if s.overlap_ratio is None else f"{s.overlap_ratio:.2f}"
            numbers = geometry, f"{s.ratio:.2f}", f"{s.gradient_ratio:.2f}", f"{s.pattern:.0%}"
            table.add_row(s.layer or "(itself)", s.kind, str(s.factor), *numbers, s.advice or "clean")
        table.add_row("images", "", str(self.factor), "", f"{self.image_ratio:.2f}", "", "", self._peak_line())
        return table

    def _peak_line(self) -> str:
        worst = max(self.peaks, key=lambda peak: peak["ratio"], default=None)
        return "" if worst is None else f"spectrum: x{worst['ratio']:.1f} at period {worst['period']}"

    def save_picture(self, path: Path | str) -> None:
        """Overlap and energy maps of every stage, and the spectrum of the images, as a PNG."""
        Figure = extras.load("matplotlib.figure", "a picture").Figure

        figure = Figure(figsize=(3 * (len(self.stages) + 1), 6), layout="constrained")
        axes = figure.subplots(2, len(self.stages) + 1, squeeze=False)
        for column, stage in enumerate(self.stages):
            for row, (what, values, ratio) in enumerate(
                (("geometry", stage.overlap, stage.overlap_ratio), ("noise", stage.energy, stage.ratio))
            ):
                axis = axes[row][column]
                axis.set_axis_off()
                if values is None:
                    continue
                tiled = torch.tensor(values).repeat(8 // stage.factor or 1, 8 // stage.factor or 1)
                axis.imshow(tiled.numpy(), vmin=0, vmax=2, cmap="coolwarm")
                axis.set_title(f"{stage.layer or stage.kind}\n{what}: {ratio:.2f}", fontsize=9)
        axes[0][-1].imshow(self.spectrum.clamp_min(1e-12).log10().numpy(), cmap="magma")
        axes[0][-1].set_title("spectrum of the images", fontsize=9)
        axes[1][-1].imshow(self.image_energy, vmin=0, vmax=2, cmap="coolwarm")
        axes[1][-1].set_title(f"images' phases: {self.image_ratio:.2f}", fontsize=9)
        for axis in (axes[0][-1], axes[1][-1]):
            axis.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100, format=Path(path).suffix[1:].lower() or "png")
        write_bytes(path, buffer.getvalue())


def checkerboard(
    generator: nn.Module,
    inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    latent: int | Sequence[int] | None = None,
    samples: int = 64,
    seed: int = 0,
) -> Report:
    """Looks for checkerboard patterns in a generator: in each of its upsampling layers, and in its images.

    A layer's output phase is its sample's place modulo the layer's factor. Per layer three energies are compared
    between phases, away from the edges: of the response of its geometry (every weight 1) to an impulse; of the response
    of its weights to white noise; and of the input's gradient for white noise as the output's. Phases of one energy may
    still have different weights: the fourth number is how much of the response to a constant input alternates between
    phases.

    Source: Odena et al. 2016, distill.pub/2016/deconv-checkerboard.

    Args:
        generator: a module that makes images [N, C, H, W]; run in evaluation mode, and left as it was.
        inputs: its arguments, for instance (latents, labels); by default normal latents.
        latent: the latents' length or shape, where it cannot be found out and no inputs are given.
        samples: images for the spectrum, where no inputs are given.
        seed: of latents and noise.

    Returns:
        A :class:`Report`: ``stages``, ``culprit``, ``clean``, ``table()``, ``save_picture(path)``, ``to_dict()``.

    Raises:
        ValueError: where the generator cannot be called with these inputs (the message says how to pass labels), makes
            no images, or has no upsampling.

    >>> report = checkerboard(nn.Sequential(nn.ConvTranspose2d(8, 3, 3, stride=2)), torch.randn(2, 8, 4, 4))
    >>> report.culprit, report.stages[0].overlap_ratio > 2
    ('0', True)
    """
    if not isinstance(generator, nn.Module):
        raise TypeError(f"checkerboard: generator must be a torch.nn.Module, got {shown(generator)}")
    samples = whole("checkerboard: samples", samples, least=1)
    random = torch.Generator().manual_seed(check_seed("checkerboard: seed", seed))
    with evaluating(generator):
        arguments = _arguments(generator, inputs, latent, samples, random)
        images, found = _trace(generator, arguments)
        if not found:
            raise ValueError(
                f"checkerboard: {type(generator).__name__} has no layer that upsamples (whose output has more rows and "
                f"columns than its input): there is nothing that could make a checkerboard"
            )
        stages = [_stage(name, module, calls, random) for name, module, calls in found]

    images = images.double().cpu()
    factor = math.prod(stage.factor for stage in stages)
    last = stages[-1].factor
    laplacian = 4 * images[..., 1:-1, 1:-1] - images[..., :-2, 1:-1] - images[..., 2:, 1:-1]
    laplacian = laplacian - images[..., 1:-1, :-2] - images[..., 1:-1, 2:]
    edge = min(4, (images.shape[-1] - 2 * last) // 2 // last * last)
    image_energy = _by_phase(laplacian, last, max(edge, 0), offset=1)
    spectrum = _spectrum(images)
    worst = max(stages, key=lambda stage: (stage.advice is not None, stage.severity))
    culprit = worst.layer if worst.advice else None
    return Report(
        stages, factor, image_energy, _ratio(image_energy), _peaks(spectrum, factor), culprit, spectrum.float()
    )


# ---- the generator as a whole -------------------------------------------------------------------------------


def _arguments(
    generator: nn.Module,
    inputs: Tensor | Sequence[Tensor] | None,
    latent: int | Sequence[int] | None,
    samples: int,
    random: torch.Generator,
) -> list[Any]:
    if inputs is None:
        return [latents(generator, latent, samples, random)]
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


def latents(
    generator: nn.Module, latent: int | Sequence[int] | None, samples: int, random: torch.Generator | None = None
) -> Tensor:
    """Normal latents [samples, ...] for a generator, whose shape is ``latent`` or what the generator shows of it.

    >>> latents(nn.Sequential(nn.Linear(16, 64)), None, 4).shape
    torch.Size([4, 16])
    """
    if latent is None:
        latent = _latent(generator)
    shape = (latent,) if isinstance(latent, int) else tuple(latent)
    parameter = next(generator.parameters(), torch.zeros(()))
    return torch.randn(samples, *shape, generator=random).to(parameter)


def _latent(generator: nn.Module) -> int | tuple[int, ...]:
    for name in ("latent", "latent_dim", "nz", "z_dim", "dim_z", "latent_size"):
        if isinstance(value := getattr(generator, name, None), int):
            return value
    for module in generator.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.ConvTranspose2d):
            return module.in_channels, 1, 1
    raise ValueError(
        f"checkerboard: the shape of the latents of {type(generator).__name__} cannot be found out; pass latent=128 or "
        f"inputs=(latents,)"
    )


def _trace(generator: nn.Module, arguments: list[Any]) -> tuple[Tensor, list[tuple[str, nn.Module, tuple]]]:
    """The images, and (name, module, arguments) of each innermost module that upsamples, in the order of calls."""
    names = {module: name for name, module in generator.named_modules()}
    calls: list[tuple[nn.Module, tuple]] = []
    outputs: dict[nn.Module, Tensor] = {}
    others: list[nn.Module] = []  # upsample in one or three dimensions
    last_convolution: list[Any] = [None, None, None]  # module, its arguments, its output
    shuffled: dict[nn.Module, tuple[nn.Module, tuple]] = {}  # the convolution before a pixel shuffle is part of it

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return
        x = args[0]
        if isinstance(module, nn.PixelShuffle) and x is last_convolution[2]:
            shuffled[module] = last_convolution[0], last_convolution[1]
        if isinstance(module, nn.Conv2d):
            last_convolution[:] = module, args, output
        if isinstance(module, _IN_ONE_OR_THREE) and x.ndim in (3, 5) and _grows(x, output):
            others.append(module)
        if x.ndim == output.ndim == 4 and min(x.shape[2:]) >= 2 and _factor(module, x, output) >= 2:
            calls.append((module, args))
            outputs[module] = output

    hooks = [module.register_forward_hook(note) for module in generator.modules()]
    try:
        with torch.no_grad():
            try:
                images = generator(*arguments)
            except Exception as error:
                raise ValueError(_call_failed(generator, arguments, error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(images, Tensor) or images.ndim != 4:
        came = shown(images)
        raise ValueError(f"checkerboard: {type(generator).__name__} made no images [N, C, H, W], but {came}")
    if others:
        raise ValueError(
            f"checkerboard: {names[others[0]] or 'the generator itself'} ({type(others[0]).__name__}) upsamples in one "
            f"or three dimensions; only layers of images [N, C, H, W] are looked at"
        )
    upsampling = {module for module, _ in calls}
    innermost = [
        (names[module], module, args)
        for module, args in calls
        if not any(child in upsampling for child in module.modules() if child is not module)
    ]
    for name, module, args in innermost:
        vertical, horizontal = _factors(module, args[0], outputs[module])
        if vertical != horizontal:
            raise ValueError(
                f"checkerboard: {name or 'the generator itself'} ({type(module).__name__}) makes {vertical} times the "
                f"rows and {horizontal} times the columns; only layers with one factor for both are looked at"
            )
    for i, (name, module, _) in enumerate(innermost):
        if module in shuffled:
            convolution, args = shuffled[module]
            innermost[i] = name, nn.Sequential(convolution, module), args
    return images, innermost


def _call_failed(generator: nn.Module, arguments: list[Any], error: Exception) -> str:
    shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else repr(a) for a in arguments)
    problem = str(error).partition("\n")[0] or type(error).__name__
    message = f"checkerboard: {type(generator).__name__} cannot be called with inputs of shape {shapes}: {problem}."
    if len(arguments) == 1:
        message += (
            " If it needs labels, pass inputs=(latents, labels) (on the command line --classes); if its latents have "
            "another shape, pass latent="
        )
    return message


_IN_ONE_OR_THREE = (nn.ConvTranspose1d, nn.ConvTranspose3d, nn.Upsample)


def _grows(x: Tensor, output: Tensor) -> bool:
    return any(after >= 1.5 * before for before, after in zip(x.shape[2:], output.shape[2:]))


def _factors(module: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int]:
    """How many rows and columns a layer makes of one."""
    if isinstance(module, nn.ConvTranspose2d):
        rows, columns = module.stride
        return rows, columns
    return round(output.shape[2] / x.shape[2]), round(output.shape[3] / x.shape[3])


def _factor(module: nn.Module, x: Tensor, output: Tensor) -> int:
    return max(_factors(module, x, output))


# ---- one layer ----------------------------------------------------------------------------------------------


def _stage(name: str, module: nn.Module, args: tuple, random: torch.Generator) -> Stage:
    x, *rest = args
    rest = [r[:1].expand(BATCH, *r.shape[1:]) if isinstance(r, Tensor) and r.ndim else r for r in rest]
    shape = BATCH, x.shape[1], SIZE, SIZE

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(x)

    with torch.no_grad():
        try:
            output = module(noise(*shape), *rest)
        except Exception:  # a layer of a fixed size: measured at that
            shape = BATCH, *x.shape[1:]
            output = module(noise(*shape), *rest)
        factor = _factor(module, noise(*shape), output)
        edge = 4 if shape[2] >= 12 else shape[2] // 4
        draws = [module(noise(*shape), *rest) for _ in range(DRAWS)]
        centre = torch.cat(draws).mean(0)
        energy = _mean_map(_by_phase(y - centre, factor, edge * factor) for y in draws)
        constant = noise(*shape[:2], 1, 1).expand(shape)
        pattern = _pattern(module(constant, *rest) - module(torch.zeros_like(constant), *rest), factor, edge * factor)
    gradient = _gradient_energy(lambda x: module(x, *rest), noise, shape, factor, edge)
    overlap = None
    with contextlib.suppress(RuntimeError, TypeError, ValueError):  # a layer that cannot be copied, or computed in fp64
        overlap = _overlap(module, shape, rest, x, factor)
    kind = type(module).__name__
    stage = Stage(
        name,
        kind,
        factor,
        overlap,
        None if overlap is None else _ratio(overlap),
        energy,
        _ratio(energy),
        gradient,
        _ratio(gradient),
        pattern,
    )
    stage.advice = _advice(module, stage)
    return stage


def _by_phase(y: Tensor, factor: int, edge: int, offset: int = 0) -> Map:
    """The mean square of y by phase, with mean 1. The first row and column of y are at ``offset``."""
    if edge:
        y = y[..., edge:-edge, edge:-edge]
    energy = torch.zeros(factor, factor, dtype=torch.float64)
    for i in range(factor):
        for j in range(factor):
            a, b = (i - offset - edge) % factor, (j - offset - edge) % factor
            energy[i, j] = y[..., a::factor, b::factor].double().square().mean()
    return _normalised(energy)


def _pattern(y: Tensor, factor: int, edge: int) -> float:
    """Of the energy of y's interior, the share that is left when every block of phases is replaced by its mean."""
    rows, columns = ((n - 2 * edge) // factor * factor for n in y.shape[2:])
    y = y[..., edge : edge + rows, edge : edge + columns].double()
    y = y.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    total = y.square().sum()
    return ((y - y.mean((3, 5), keepdim=True)).square().sum() / total).item() if total > 0 else 0.0


def _normalised(energy: Tensor) -> Map:
    mean = energy.mean()
    return (energy / mean if mean > 0 else torch.ones_like(energy)).tolist()


def _mean_map(maps: Iterable[Map]) -> Map:
    return torch.tensor(list(maps), dtype=torch.float64).mean(0).tolist()


def _ratio(energy: Map) -> float:
    values = [value for row in energy for value in row]
    return max(values) / min(values) if min(values) > 0 else math.inf


def _gradient_energy(
    run: Callable[[Tensor], Tensor], noise: Callable[..., Tensor], shape: Sequence[int], factor: int, edge: int
) -> Map:
    energy = torch.zeros(factor, factor, dtype=torch.float64)
    with torch.enable_grad():
        x = noise(*shape).requires_grad_()
        y = run(x)
        border = edge * factor
        for _ in range(DRAWS):
            white = noise(*y.shape)
            for i in range(factor):
                for j in range(factor):
                    one = torch.zeros_like(y)
                    one[..., border + i : y.shape[2] - border : factor, border + j : y.shape[3] - border : factor] = 1
                    (g,) = torch.autograd.grad(y, x, white * one, retain_graph=True)
                    energy[i, j] += g.double().square().sum() / one.sum()
    return _normalised(energy)


_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)


@torch.no_grad()
def _overlap(module: nn.Module, shape: Sequence[int], rest: Sequence[Any], like: Tensor, factor: int) -> Map:
    """The energy by phase of a copy's response to an impulse, its convolutions' weights all 1 and its biases 0."""
    same = copy.deepcopy(module).double()
    for parent in same.modules():
        for name, child in parent.named_children():
            if isinstance(child, _NORMS):
                setattr(parent, name, nn.Identity())
    for parameter in same.parameters():
        parameter.fill_(1 if parameter.ndim >= 2 else 0)
    x = torch.zeros(1, *shape[1:], dtype=torch.float64, device=like.device)
    x[:, :, shape[2] // 2, shape[3] // 2] = 1
    rest = [r[:1] if isinstance(r, Tensor) and r.ndim else r for r in rest]
    return _by_phase(same(x, *rest), factor, 0)


def _advice(module: nn.Module, stage: Stage) -> str | None:
    if isinstance(module, nn.ConvTranspose2d) and (stage.overlap_ratio or 1) > CLEAN:
        kernel, stride = module.kernel_size[0], module.stride[0]
        return (
            f"stride {stride} does not divide kernel size {kernel}: take kernel size {2 * stride}, a "
            f"resize-convolution or a sub-pixel convolution (gankern.replace_upsampling)"
        )
    if (stage.overlap_ratio or 1) > CLEAN:
        return "its geometry overlaps unevenly: take a resize-convolution (gankern.nn.UpsampleConv2d)"
    if max(stage.ratio, stage.gradient_ratio) > CLEAN_WEIGHTS or stage.pattern > CLEAN_PATTERN:
        return (
            "its geometry is even, its weights are not: a resize-convolution cannot have such weights "
            "(gankern.replace_upsampling), a sub-pixel convolution need not start with them (gankern.nn.init.icnr_)"
        )
    return None


# ---- the images ---------------------------------------------------------------------------------------------


def _spectrum(images: Tensor) -> Tensor:
    images = images - images.mean((2, 3), keepdim=True)
    # Hann's window: what differs between opposite edges would otherwise be in all frequencies of an axis.
    for axis in (2, 3):
        window = torch.hann_window(images.shape[axis], dtype=images.dtype, device=images.device)
        images = images * window.unflatten(0, (-1, *[1] * (3 - axis)))
    power = torch.fft.fft2(images).abs().square().mean((0, 1))
    return torch.fft.fftshift(power)


def _peaks(spectrum: Tensor, factor: int) -> list[dict[str, Any]]:
    height, width = spectrum.shape
    peaks = []
    period = 2
    while period <= factor and period <= min(height, width) // 4:
        for vertical, horizontal in ((0, 1), (1, 0), (1, 1)):
            y = (height // 2 + vertical * height // period) % height
            x = (width // 2 + horizontal * width // period) % width
            around = [
                spectrum[(y + dy) % height, (x + dx) % width]
                for dy in range(-2, 3)
                for dx in range(-2, 3)
                if max(abs(dy), abs(dx)) == 2
            ]
            median = torch.stack(around).median()
            ratio = (spectrum[y, x] / median).item() if median > 0 else 1.0
            peaks.append({"period": period, "frequency": [vertical / period, horizontal / period], "ratio": ratio})
        period *= 2
    return peaks
