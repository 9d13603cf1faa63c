"""Whether a generator makes checkerboard patterns, and which of its layers does.

An upsampling layer treats its output samples differently according to their place modulo the stride, their phase. If
some phases sum more terms than others, noise, features and gradients come out with a grid of that stride in them: a
checkerboard in images, a tone at the sampling rate over the stride in signals.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
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
SIZES = {1: 64, 2: 16, 3: 12}  # of the feature maps that layers are measured on, by their dimensions
DRAWS = 4
BATCH = 8

Map = list[Any]  # a number for each phase: [factor] for signals, [factor][factor] for images, and so on

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = {3: "signals [N, C, L]", 4: "images [N, C, H, W]", 5: "volumes [N, C, D, H, W]"}


@dataclass
class Stage:
    """One upsampling layer. Maps hold the energy of each output phase, [factor] for each dimension, with mean 1; ratios
    are that of the largest entry over the smallest: 1 is clean."""

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
    # Power of the images at frequencies of the strides over the median power around: period in pixels, frequency in
    # cycles a pixel along each axis (vertical, horizontal), ratio.
    peaks: list[dict[str, Any]]
    culprit: str | None  # the layer with the largest ratio; None where all are clean
    spectrum: Tensor = field(repr=False)  # [H, W] (or [L], [D, H, W]), mean power, frequency 0 in the middle

    @property
    def clean(self) -> bool:
        return self.culprit is None

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds: everything but the spectrum."""
        result = {key: value for key, value in vars(self).items() if key not in ("stages", "spectrum")}
        return result | {"clean": self.clean, "stages": [asdict(stage) for stage in self.stages]}

    def table(self) -> Table:
        """The stages as a rich table; below it what to do about each, and where the images' spectrum has its peak."""
        from rich.table import Table
        from rich.text import Text

        lines = [f"{s.layer or '(itself)'}: {s.advice or 'clean'}" for s in self.stages] + self._peak_lines()
        title = "Upsampling stages: largest over smallest phase energy (1 is clean)"
        table = Table(title=title, caption=Text("\n".join(lines)), caption_justify="left")
        for column in ("layer", "kind", "factor", "geometry", "noise", "gradient", "pattern"):
            table.add_column(column, justify="left" if column in ("layer", "kind") else "right", overflow="fold")
        for s in self.stages:
            geometry = "-" if s.overlap_ratio is None else f"{s.overlap_ratio:.2f}"
            numbers = geometry, f"{s.ratio:.2f}", f"{s.gradient_ratio:.2f}", f"{s.pattern:.0%}"
            table.add_row(s.layer or "(itself)", s.kind, str(s.factor), *numbers)
        what = _KINDS[self.spectrum.ndim + 2].split()[0]
        table.add_row(what, "", str(self.factor), "", f"{self.image_ratio:.2f}", "", "")
        return table

    def _peak_lines(self) -> list[str]:
        worst = max(self.peaks, key=lambda peak: peak["ratio"], default=None)
        return [] if worst is None else [f"spectrum: x{worst['ratio']:.1f} at period {worst['period']}"]

    def save_picture(self, path: Path | str) -> None:
        """Overlap and energy maps of every stage, and the spectrum of the images, as a PNG. Of volumes, slices stand
        side by side, and the spectrum is the mean over the depth's frequencies."""
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
                flat = _as_plane(torch.tensor(values))
                tiled = flat.repeat(*(8 // n or 1 for n in flat.shape))
                axis.imshow(tiled.numpy(), vmin=0, vmax=2, cmap="coolwarm")
                axis.set_title(f"{stage.layer or stage.kind}\n{what}: {ratio:.2f}", fontsize=9)
        what = _KINDS[self.spectrum.ndim + 2].split()[0]
        power = self.spectrum.clamp_min(1e-12).log10()
        if power.ndim == 1:
            axes[0][-1].plot(power.numpy())
        else:
            axes[0][-1].imshow((power if power.ndim == 2 else power.mean(0)).numpy(), cmap="magma")
        axes[0][-1].set_title(f"spectrum of the {what}", fontsize=9)
        axes[1][-1].imshow(_as_plane(torch.tensor(self.image_energy)).numpy(), vmin=0, vmax=2, cmap="coolwarm")
        axes[1][-1].set_title(f"{what}' phases: {self.image_ratio:.2f}", fontsize=9)
        for axis in (axes[0][-1], axes[1][-1]):
            axis.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100, format=Path(path).suffix[1:].lower() or "png")
        write_bytes(path, buffer.getvalue())


def _as_plane(phases: Tensor) -> Tensor:
    return torch.cat(list(phases), 1) if phases.ndim == 3 else phases.expand(1, -1) if phases.ndim == 1 else phases


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

    Source: Odena et al. 2016, distill.pub/2016/deconv-checkerboard; for audio Donahue et al. 2019, arXiv 1802.04208,
    section 3.2, and Pons et al. 2021, arXiv 2010.14356.

    Args:
        generator: a module that makes images [N, C, H, W], signals [N, C, L] or volumes [N, C, D, H, W]; run in
            evaluation mode, and left as it was. Layers of that many dimensions are looked at.
        inputs: its arguments, for instance (latents, labels); by default normal latents.
        latent: the latents' length or shape, where it cannot be found out and no inputs are given.
        samples: images for the spectrum, where no inputs are given.
        seed: of latents and noise.

    Returns:
        A :class:`Report`: ``stages``, ``culprit``, ``clean``, ``table()``, ``save_picture(path)``, ``to_dict()``.

    Raises:
        ValueError: where the generator cannot be called with these inputs (the message says how to pass labels), makes
            no images, signals or volumes, has no upsampling, or upsamples in another number of dimensions than it ends
            with.

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
                f"checkerboard: {type(generator).__name__} has no layer that upsamples (whose output is larger than "
                f"its input along every axis): there is nothing that could make a checkerboard"
            )
        stages = [_stage(name, module, calls, random) for name, module, calls in found]

    images = images.double().cpu()
    factor = math.prod(stage.factor for stage in stages)
    last = stages[-1].factor
    edge = min(4, (min(images.shape[2:]) - 2 * last) // 2 // last * last)
    image_energy = _by_phase(_laplacian(images), last, max(edge, 0), offset=1)
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
        if isinstance(module, _TRANSPOSED):
            return module.in_channels, *[1] * len(module.kernel_size)
    raise ValueError(
        f"checkerboard: the shape of the latents of {type(generator).__name__} cannot be found out; pass latent=128 or "
        f"inputs=(latents,)"
    )


def _trace(generator: nn.Module, arguments: list[Any]) -> tuple[Tensor, list[tuple[str, nn.Module, tuple]]]:
    """The images, and (name, module, arguments) of each innermost module that upsamples, in the order of calls."""
    names = {module: name for name, module in generator.named_modules()}
    calls: list[tuple[nn.Module, tuple]] = []
    outputs: dict[nn.Module, Tensor] = {}
    by_kind: list[tuple[nn.Module, int]] = []  # upsampling layers by their class, and how many dimensions they had
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
        if isinstance(module, nn.Linear):  # which has no phases: every output is a sum of its own
            return
        if isinstance(module, (*_TRANSPOSED, nn.Upsample)) and x.ndim in _KINDS and _factor(module, x, output) >= 2:
            by_kind.append((module, x.ndim))
        if x.ndim == output.ndim and x.ndim in _KINDS and min(x.shape[2:]) >= 2 and _factor(module, x, output) >= 2:
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
    if not isinstance(images, Tensor) or images.ndim not in _KINDS:
        came, kinds = shown(images), list(_KINDS.values())
        raise ValueError(
            f"checkerboard: {type(generator).__name__} made no {', '.join(kinds[:-1])} or {kinds[-1]}, but {came}"
        )
    for module, ndim in by_kind:
        if ndim != images.ndim:
            raise ValueError(
                f"checkerboard: {names[module] or 'the generator itself'} ({type(module).__name__}) upsamples "
                f"{_KINDS[ndim]}, and the generator makes {_KINDS[images.ndim]}; only layers of that "
                f"many dimensions are looked at"
            )
    calls = [(module, args) for module, args in calls if outputs[module].ndim == images.ndim]
    upsampling = {module for module, _ in calls}
    innermost = [
        (names[module], module, args)
        for module, args in calls
        if not any(child in upsampling for child in module.modules() if child is not module)
    ]
    for name, module, args in innermost:
        factors = _factors(module, args[0], outputs[module])
        if len(set(factors)) > 1:
            raise ValueError(
                f"checkerboard: {name or 'the generator itself'} ({type(module).__name__}) makes {factors} times the "
                f"samples of its axes; only layers with one factor for all axes are looked at"
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


def _factors(module: nn.Module, x: Tensor, output: Tensor) -> tuple[int, ...]:
    """How many samples a layer makes of one along each axis."""
    if isinstance(module, _TRANSPOSED):
        return module.stride
    return tuple(round(after / before) for before, after in zip(x.shape[2:], output.shape[2:]))


def _factor(module: nn.Module, x: Tensor, output: Tensor) -> int:
    return max(_factors(module, x, output))


# ---- one layer ----------------------------------------------------------------------------------------------


def _stage(name: str, module: nn.Module, args: tuple, random: torch.Generator) -> Stage:
    x, *rest = args
    rest = [r[:1].expand(BATCH, *r.shape[1:]) if isinstance(r, Tensor) and r.ndim else r for r in rest]
    axes = x.ndim - 2
    shape = BATCH, x.shape[1], *[SIZES[axes]] * axes

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
        constant = noise(*shape[:2], *[1] * axes).expand(shape)
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
    """The mean square of y by phase, with mean 1. The first sample of each axis of y is at ``offset``."""
    axes = y.ndim - 2
    # As many samples of one phase as of another.
    y = y[_last(slice(edge, edge + (n - 2 * edge) // factor * factor) for n in y.shape[2:])]
    energy = torch.zeros([factor] * axes, dtype=torch.float64)
    for phase in _phases(factor, axes):
        first = [(i - offset - edge) % factor for i in phase]
        energy[phase] = y[_last(slice(i, None, factor) for i in first)].double().square().mean()
    return _normalised(energy)


def _last(each: Iterable[Any]) -> tuple[Any, ...]:
    """The index of a tensor's last axes."""
    return ..., *each


def _phases(factor: int, axes: int) -> Iterable[tuple[int, ...]]:
    return itertools.product(range(factor), repeat=axes)


def _pattern(y: Tensor, factor: int, edge: int) -> float:
    """Of the energy of y's interior, the share that is left when every block of phases is replaced by its mean."""
    sizes = [(n - 2 * edge) // factor * factor for n in y.shape[2:]]
    y = y[_last(slice(edge, edge + n) for n in sizes)].double()
    for axis in range(y.ndim - 1, 1, -1):
        y = y.unflatten(axis, (-1, factor))
    total = y.square().sum()
    within = tuple(range(3, y.ndim, 2))
    return ((y - y.mean(within, keepdim=True)).square().sum() / total).item() if total > 0 else 0.0


def _normalised(energy: Tensor) -> Map:
    mean = energy.mean()
    return (energy / mean if mean > 0 else torch.ones_like(energy)).tolist()


def _mean_map(maps: Iterable[Map]) -> Map:
    return torch.tensor(list(maps), dtype=torch.float64).mean(0).tolist()


def _ratio(energy: Map) -> float:
    least, most = torch.tensor(energy, dtype=torch.float64).aminmax()
    return (most / least).item() if least > 0 else math.inf


def _gradient_energy(
    run: Callable[[Tensor], Tensor], noise: Callable[..., Tensor], shape: Sequence[int], factor: int, edge: int
) -> Map:
    axes = len(shape) - 2
    energy = torch.zeros([factor] * axes, dtype=torch.float64)
    with torch.enable_grad():
        x = noise(*shape).requires_grad_()
        y = run(x)
        border = edge * factor
        for _ in range(DRAWS):
            white = noise(*y.shape)
            for phase in _phases(factor, axes):
                one = torch.zeros_like(y)
                one[_last(slice(border + i, n - border, factor) for i, n in zip(phase, y.shape[2:]))] = 1
                (g,) = torch.autograd.grad(y, x, white * one, retain_graph=True)
                energy[phase] += g.double().square().sum() / one.sum()
    return _normalised(energy)


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


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
    x[_last(n // 2 for n in shape[2:])] = 1
    rest = [r[:1] if isinstance(r, Tensor) and r.ndim else r for r in rest]
    return _by_phase(same(x, *rest), factor, 0)


def _advice(module: nn.Module, stage: Stage) -> str | None:
    axes = torch.tensor(stage.energy).ndim
    # There are layers of ours, and replacements, for images; the same mathematics by torch's for the others.
    resize = "gankern.nn.UpsampleConv2d" if axes == 2 else f"nn.Upsample and nn.Conv{axes}d"
    replacing = "gankern.replace_upsampling" if axes == 2 else f"gankern.nn.SubpixelConv{axes}d"
    if isinstance(module, _TRANSPOSED) and (stage.overlap_ratio or 1) > CLEAN:
        kernel, stride = module.kernel_size[0], module.stride[0]
        return (
            f"stride {stride} does not divide kernel size {kernel}: take kernel size {2 * stride}, a "
            f"resize-convolution or a sub-pixel convolution ({replacing})"
        )
    if (stage.overlap_ratio or 1) > CLEAN:
        return f"its geometry overlaps unevenly: take a resize-convolution ({resize})"
    if max(stage.ratio, stage.gradient_ratio) > CLEAN_WEIGHTS or stage.pattern > CLEAN_PATTERN:
        return (
            f"its geometry is even, its weights are not: a resize-convolution "
            f"({'gankern.replace_upsampling' if axes == 2 else resize}) cannot have such weights, "
            f"a sub-pixel convolution need not start with them (gankern.nn.init.icnr_)"
        )
    return None


# ---- the images ---------------------------------------------------------------------------------------------


def _laplacian(images: Tensor) -> Tensor:
    """Second differences along all axes, of the samples that have neighbours on all of them."""
    total = torch.zeros(())
    for axis in range(2, images.ndim):
        line = images
        for other in range(2, images.ndim):
            if other != axis:
                line = line.narrow(other, 1, line.shape[other] - 2)
        total = total - line.diff(n=2, dim=axis)
    return total


def _spectrum(images: Tensor) -> Tensor:
    axes = tuple(range(2, images.ndim))
    images = images - images.mean(axes, keepdim=True)
    # Hann's window: what differs between opposite edges would otherwise be in all frequencies of an axis.
    for axis in axes:
        window = torch.hann_window(images.shape[axis], dtype=images.dtype, device=images.device)
        images = images * window.unflatten(0, (-1, *[1] * (images.ndim - 1 - axis)))
    power = torch.fft.fftn(images, dim=axes).abs().square().mean((0, 1))
    return torch.fft.fftshift(power)


def _peaks(spectrum: Tensor, factor: int) -> list[dict[str, Any]]:
    axes = spectrum.ndim
    ring = [step for step in itertools.product(range(-2, 3), repeat=axes) if max(map(abs, step)) == 2]
    peaks = []
    period = 2
    while period <= factor and period <= min(spectrum.shape) // 4:
        for direction in itertools.product((0, 1), repeat=axes):
            if not any(direction):
                continue
            at = [(n // 2 + d * n // period) % n for n, d in zip(spectrum.shape, direction)]
            around = [spectrum[tuple((i + d) % n for i, d, n in zip(at, step, spectrum.shape))] for step in ring]
            median = torch.stack(around).median()
            ratio = (spectrum[tuple(at)] / median).item() if median > 0 else 1.0
            peaks.append({"period": period, "frequency": [d / period for d in direction], "ratio": ratio})
        period *= 2
    return peaks
