"""What became of a module, for people and for programs."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn


@dataclass(frozen=True)
class Row:
    """What became of one layer."""

    layer: str  # its name in the module; "" is the module itself
    before: str
    after: str | None  # None where it was left as it is
    note: str = ""


@dataclass(frozen=True)
class Call:
    """A layer, or a function that a layer's code calls, as a forward met it."""

    layer: str  # whose forward or code it is
    operation: str  # the layer's kind, or the function: "Conv2d 3x3", "F.relu"
    count: int  # how often in one forward
    now: str  # what runs for it: implementation and way
    why: str = ""  # why not one of ours, or not more of it
    in_penalty: str = ""  # what runs where the gradient of the inputs is differentiated again, if that is another thing


@dataclass(frozen=True)
class Measured:
    """One pass before and after."""

    mode: str  # "forward", "forward + backward" or "double backward"
    before: float | None  # milliseconds
    after: float | None
    error: float | None  # largest difference of any result, relative to that result's largest value
    error_in_double: float | None = None  # the same of the module in double precision, where it runs in that
    failure: str | None = None  # why there are no numbers

    @property
    def ratio(self) -> float | None:
        return self.before / self.after if self.before and self.after else None


@dataclass
class Report:
    """What :func:`gankern.accelerate` did: ``print`` it, or take ``to_dict()``.

    ``module`` is the accelerated module, ``rows`` what was replaced and what was left and why, ``calls`` every layer
    with parameters and every call of a function that a forward met, with what ran, where ``example_inputs=`` (or
    ``verify=``) was given, ``measured`` errors and times where ``verify=`` was given, ``notes`` what concerns the
    whole module.
    """

    name: str
    module: nn.Module
    rows: list[Row] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.after is not None]

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if row.after is None]

    @property
    def gains(self) -> bool:
        """Whether anything of ours ran in the forwards that ``calls`` lists."""
        return any("gankern" in text for call in self.calls for text in (call.now, call.in_penalty))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "module": self.name,
            "replaced": [asdict(row) for row in self.replaced],
            "left": [asdict(row) for row in self.left],
            "calls": [asdict(call) for call in self.calls],
            "measured": [asdict(m) | {"ratio": m.ratio} for m in self.measured],
            "notes": list(self.notes),
        }

    def __rich__(self) -> Table:
        outer = Table.grid()
        outer.add_row(self._layers())
        if self.calls:
            outer.add_row(self._calls())
        if self.measured:
            outer.add_row(self._times())
        for note in self.notes:
            outer.add_row(Text(note))
        return outer

    def _layers(self) -> Table:
        ran = ""
        if self.calls:
            layers = {call.layer for call in self.calls}
            reached = sum(row.layer in layers for row in self.replaced)
            ran = f" ({reached} of them ran)"
        title = f"{self.name}: {len(self.replaced)} replaced{ran}, {len(self.left)} left"
        table = Table(title=title, title_justify="left")
        for column in ("layer", "before", "after", "note"):
            table.add_column(column, overflow="fold")
        for row in (*self.replaced, *self.left):
            after = "left as it is" if row.after is None else row.after
            style = "dim" if row.after is None else None
            table.add_row(*(Text(cell) for cell in (row.layer or "(itself)", row.before, after, row.note)), style=style)
        return table

    def _calls(self) -> Table:
        table = Table(title="what one forward ran", title_justify="left")
        for column in ("layer", "operation", "times", "runs as", "why", "under a penalty"):
            table.add_column(column, overflow="fold", justify="right" if column == "times" else "left")
        for c in self.calls:
            cells = (c.layer or "(itself)", c.operation, str(c.count), c.now, c.why, c.in_penalty)
            table.add_row(*map(Text, cells), style="dim" if c.now == "torch" and not c.in_penalty else None)
        return table

    def _times(self) -> Table:
        table = Table(title="before and after", title_justify="left")
        for column in ("", "before", "after", "faster", "largest difference", "in double"):
            table.add_column(column, justify="right" if column else "left")
        for m in self.measured:
            if m.failure is not None:
                table.add_row(m.mode, "", "", "", Text(m.failure))
                continue
            exact = "" if m.error_in_double is None else f"{m.error_in_double:.1e}"
            table.add_row(m.mode, f"{m.before:.2f} ms", f"{m.after:.2f} ms", f"{m.ratio:.2f}x", f"{m.error:.1e}", exact)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140).print(self)
        return text.getvalue().rstrip()

    __repr__ = __str__
