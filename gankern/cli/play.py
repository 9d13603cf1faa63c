"""gankern play: GANs in the plane, recorded while they train, as one HTML file."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gankern.cli._choose import check_output, choice
from gankern.cli._fail import fail
from gankern.core import extras
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import whole
from gankern.core.names import look_up
from gankern.data import POINTS, Points
from gankern.theory.play import DATA, LOSSES, record, write_page
from gankern.theory.play.recording import SHOWN, Recording


def play(
    out: Annotated[Path, typer.Option(help="the file")] = Path("play.html"),
    data: Annotated[
        list[str] | None,
        choice(POINTS, "what is learned; repeat for several", show_default=", ".join(DATA)),
    ] = None,
    points: Annotated[
        Path | None, typer.Option(help="also points of your own: a text file of two numbers a line", show_default=False)
    ] = None,
    loss: Annotated[list[str] | None, choice(LOSSES, "a loss; repeat for several", show_default="all")] = None,
    steps: Annotated[int, typer.Option(min=1, help="generator steps of each run")] = 1200,
    frames: Annotated[int, typer.Option(min=2, help="moments that are recorded of each run")] = 80,
    width: Annotated[int, typer.Option(min=1, help="of the networks' hidden layers")] = 64,
    seed: Annotated[int, typer.Option(help="decides weights, points and latents")] = 0,
) -> None:
    """Train GANs in the plane with several losses and write one HTML file that plays them, which needs nothing else."""
    try:
        check_output("--out", out)
        check_seed("--seed", seed)
        whole("--frames", frames, least=2, most=steps + 1)
        for package, extra in (("jinja2", "report"), ("ot", "train")):
            extras.load(package, "gankern play", extra)
        sets: dict[str, str | Points] = {name: name for name in data or (() if points else DATA)}
        for name in sets:
            look_up(POINTS, name, "data")
        losses = list(dict.fromkeys(loss or LOSSES))
        for name in losses:
            look_up(LOSSES, name, "loss")
        if points is not None:
            sets[points.stem] = _own(points)
        console = Console()
        runs: dict[str, list[Recording]] = {}
        with console.status("") as status:
            for set_name, source in sets.items():
                for name in losses:
                    for found in record(name, source, steps=steps, frames=frames, seed=seed, width=width):
                        if isinstance(found, Recording):
                            runs.setdefault(set_name, []).append(found)
                        else:
                            status.update(f"{set_name}, {name}: step {found} of {steps}")
        true = {
            name: (source if isinstance(source, Points) else POINTS[source]).sample(
                SHOWN, torch.Generator().manual_seed(seed)
            )
            for name, source in sets.items()
        }
        size = write_page(out, runs, true, {"steps": steps, "frames": frames, "width": width, "seed": seed})
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        fail(error)
    console.print(
        f"{out}: {len(sets)} data sets, {len(losses)} losses, {size / 1e6:.1f} MB", soft_wrap=True, markup=False
    )


def _own(path: Path) -> Points:
    """The points of a file, moved and scaled into the picture."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--points {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ValueError(f"--points {path} is no text file; a text of two numbers a line is expected") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            x, y = map(float, line.replace(",", " ").split())
        except ValueError:
            raise ValueError(f"--points {path}, line {number}: two numbers are expected, got {line[:60]!r}") from None
        rows.append((x, y))
    found = torch.tensor(rows, dtype=torch.float64)
    if len(found) < 2 or not bool(found.isfinite().all()):
        raise ValueError(f"--points {path}: at least two points of finite numbers are expected, got {len(found)}")
    low, high = found.min(0).values, found.max(0).values
    reach = (high - low).max().item() / 2 or 1.0
    scaled = ((found - (low + high) / 2) / reach * 1.6).float()

    def drawn(number: int, random: torch.Generator | None = None) -> torch.Tensor:
        return scaled[torch.randint(len(scaled), (number,), generator=random)]

    return Points(drawn)
