"""What a game is: the part of a training run that differs from one system to the next.

The loop (:mod:`gankern.training`) knows nothing of generators and discriminators. It asks a game for its networks and
players once, and for the moves of each step:

    for player, loss in game.moves():
        zero the gradients of the player's parameters
        loss.backward(inputs=the player's parameters)
        step the player's optimiser

Control returns to ``moves`` after the step, so the next loss is computed with the updated weights: the order in which
moves are yielded *is* the algorithm. A loss owns its graph: what two moves use is detached in one of them, or made
again. ``backward(inputs=...)`` keeps the other players' gradients clean, and spares the weight gradients that nobody
would use.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gankern import data
from gankern.core.evaluation import evaluating
from gankern.core.names import look_up
from gankern.data import ImageSource, Points
from gankern.data.batches import part_of
from gankern.models import layers as layer_tables
from gankern.models._record import Preset
from gankern.models.layers import Layers

if TYPE_CHECKING:
    from gankern.games._config import Config

Samples = Tensor | ImageSource | Points
Loss = Tensor | Callable[[slice], Tensor]
Figures = dict[str, float]

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}  # of options

# Of the games' own options those that mean nothing at 0: rates, spreads, and numbers of features. None may be negative.
POSITIVE = frozenset(
    {"g_lr", "pixel_std", "mismatches", "classes", "labels_per_class", "hidden", "features", "embedding"}
)


def evenly(number: int, length: int) -> Tensor:
    """``number`` indices, or as many as there are, from the first on at equal distances. Of data that lie in the order
    of their classes, as MNIST's digits and the folders of classes do, the first ones are of a few classes alone.

    >>> evenly(4, 10), evenly(4, 2)
    (tensor([0, 2, 5, 7]), tensor([0, 1]))
    """
    number = min(number, length)
    return torch.arange(number) * length // max(1, number)


@dataclass(frozen=True)
class Player:
    """Who moves: the networks whose parameters one optimiser steps. A network may belong to several players.

    ``title`` is what tables call him, by default his name in ``Game.players``. ``lr``, ``betas`` and ``optimiser`` are
    the run's, where they are None.
    """

    networks: tuple[str, ...]
    title: str | None = None
    lr: float | None = None
    betas: tuple[float, float] | None = None
    optimiser: str | None = None


@dataclass(frozen=True)
class Picture:
    """What is drawn: images [N, C, H, W] in [-1, 1], ``columns`` a row, or points [N, 2] before the true ``modes``.

    ``rows`` are the names of the rows, from the top.
    """

    batch: Tensor
    columns: int = 8
    modes: Tensor | None = None
    rows: tuple[str, ...] = ()


class Run:
    """What a game is given: the configuration, the layers to build of, the device, the data, and random numbers.

    Everything is drawn on the CPU for the whole batch, and each of several processes takes its part: a seed means the
    same numbers on every device, with every set of layers, in any number of processes.
    """

    def __init__(
        self,
        config: Config,
        layers: str,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
        samples: Samples | None = None,
        condition: Tensor | ImageSource | None = None,
        batches: Iterator | None = None,
        mean: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> None:
        self.config, self.side, self.device, self.share = config, layers, torch.device(device), share
        self.layers: Layers = layer_tables.get(layers)
        self.samples, self.condition, self.batches = samples, condition, batches
        self.mean = mean  # over the processes, of what each has of its part of the batch
        # Instead of a draw, whatever this makes of it: for the loop, which records a step's draws and gives them to it.
        self.drawn: Callable[[Callable[[], Any]], Any] | None = None

    @property
    def images(self) -> Tensor | ImageSource:
        """The samples, of a game that is trained on images."""
        assert self.samples is not None and not isinstance(self.samples, Points)
        return self.samples

    @property
    def labels(self) -> Tensor:
        """The condition, of a game that needs labels."""
        assert isinstance(self.condition, Tensor)
        return self.condition

    def known_labels(self) -> Tensor | None:
        """The labels [N] of the data, for a measure that needs them though the game does not; None of data without."""
        try:
            return data.condition(self.config.data, self.images, "labels", self.config.on_error)[:]
        except ValueError:  # which says that there are none, or that these are images of one's own
            return None

    def held_out(self, share: float) -> tuple[Tensor, Tensor]:
        """Which samples are trained on, and which are held out: the same in every run on these data."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        number = round(share * len(order))
        return order[number:], order[:number]

    def spread(self, number: int) -> Tensor:
        """Indices of so many samples, or of all: see ``evenly``."""
        return evenly(number, len(self.images))

    def batch(self) -> tuple[Tensor, ...]:
        """The next real samples, (x,), or with their condition, (x, y): this process's part, on the device, of the
        networks' dtype."""
        parts: tuple[Tensor, ...] = self.draw(self._next_batch)
        if not self.config.flip:
            return parts
        mirrored = self.uniform().view(-1, 1, 1, 1) < 0.5
        return tuple(torch.where(mirrored, x.flip(3), x) if x.ndim == 4 else x for x in parts)  # both of a pair

    def _next_batch(self) -> tuple[Tensor, ...]:
        assert self.batches is not None  # a game without data is there to be looked at, and makes no move
        batch = next(self.batches)
        dtype = torch.get_default_dtype()  # images that are drawn or read are float32
        return tuple(
            x.to(self.device, dtype if x.is_floating_point() else None)
            for x in (batch if isinstance(batch, tuple) else (batch,))
        )

    def draw(self, draw: Callable[[], Any]) -> Any:
        """What ``draw`` makes of random numbers or data: a tensor or a tuple of them, on the device. A game whose steps
        can be CUDA graphs (``work``) draws in no other way."""
        return draw() if self.drawn is None else self.drawn(draw)

    def conditions(self) -> Tensor:
        """What generated samples are conditioned on: drawn from the data, as often as they are there."""
        condition, size = self.condition, self.config.batch_size
        assert condition is not None
        return self.draw(lambda: self.own(condition[torch.randint(len(condition), (size,))]))

    def own(self, drawn: Tensor) -> Tensor:
        """This process's part of what was drawn for the whole batch, on the device."""
        return drawn.to(self.device)[part_of(len(drawn), self.share)]

    def normal(self, *size: int) -> Tensor:
        """N(0, 1), [part of the batch, *size]: latents for one move."""
        return self.draw(lambda: self.own(torch.randn(self.config.batch_size, *size)))

    def uniform(self, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """U(low, high), [part of the batch, *size]."""
        return self.draw(lambda: self.own(torch.rand(self.config.batch_size, *size))) * (high - low) + low

    def classes(self, number: int) -> Tensor:
        """Classes, uniformly from 0 to ``number`` - 1, [part of the batch] int64."""
        return self.draw(lambda: self.own(torch.randint(number, (self.config.batch_size,))))


class Game:
    """The base of all games. A subclass builds its networks in ``__init__``, from ``run.config`` and ``run.layers``
    alone (a checkpoint is looked at without data), and says who the players are and what they do:

    >>> class Tiny(Game):
    ...     '''One layer against one layer.'''
    ...     def __init__(self, run):
    ...         super().__init__(run)
    ...         self.networks = {"generator": run.layers.linear(8, 2), "critic": run.layers.linear(2, 1)}
    ...         self.players = {"d": Player(("critic",)), "g": Player(("generator",))}
    ...     def moves(self):
    ...         generator, critic = self.networks["generator"], self.networks["critic"]
    ...         (real,) = self.run.batch()
    ...         yield "d", critic(generator(self.run.normal(8)).detach()).mean() - critic(real).mean()
    ...         yield "g", -critic(generator(self.run.normal(8))).mean()

    A move's loss is a tensor; or, of a game that can divide its batch (``accumulates``), a function from a slice of the
    process's part of the batch to the loss of that part.
    """

    family: ClassVar[str] = "generator and discriminator"  # under which `gankern train` lists it
    points: ClassVar[bool] = False  # whether it is for points in the plane; else for images
    needs: ClassVar[str | None] = None  # what the data must have beside the samples: see gankern.data.condition
    data: ClassVar[str] = "digits"  # what it is trained on where nothing is said
    preset: ClassVar[Preset] = Preset()  # what differs from Config's defaults
    held_out: ClassVar[float] = 0.0  # the share of the samples, a tensor, that is not trained on
    accumulates: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()  # which of games.ADVERSARIAL_OPTIONS it has a use for; others raise
    own_loss: ClassVar[bool] = False  # whether its losses are its own: options loss and real_target are refused
    averaged: ClassVar[str | None] = None  # the network whose moving average is kept where config.ema is set

    @dataclass(frozen=True)
    class Options:
        """The game's own options, beside those of every run: a dataclass of numbers, strings and switches. Numbers are
        finite and 0 or more, those that ``POSITIVE`` names above 0."""

    networks: dict[str, nn.Module]
    players: dict[str, Player]
    optimisers: dict[str, torch.optim.Optimizer]  # by player, put there by the loop

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.options = self.options_of(run.config.model, run.config.options)

    def refuse(self, *options: str, where: str) -> None:
        """Raises a ValueError for the first of these options, of the run or of the game's own, that is set to another
        value than its usual one though it has no effect ``where``."""
        for name in options:
            holder: Any = self.options if hasattr(self.options, name) else self.config
            usual = self.preset.get(name) if holder is self.config else None
            usual = type(holder).__dataclass_fields__[name].default if usual is None else usual
            if (value := getattr(holder, name)) != usual:
                raise ValueError(
                    f"{self.config.model}: {name} has no effect {where}; leave it out, or at {usual}, got {value}"
                )

    @classmethod
    def options_of(cls, name: str, given: Mapping[str, Any]) -> Any:
        """The game's options with what is given, checked; ValueErrors say which there are."""
        known = {field.name: field for field in fields(cls.Options)}
        values = {}
        for option, value in given.items():
            if not known:
                raise ValueError(f"{name} has no options of its own, got {option}={value}")
            default: Any = look_up(known, option, f"option of {name}").default
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(default):
                raise ValueError(f"{name}: option {option} must be {KINDS[type(default)]}, got {value!r}")
            number = isinstance(value, int | float)
            if number and not (0 <= value < inf and (value or option not in POSITIVE)):
                accepted = "positive" if option in POSITIVE else "0 or more"
                raise ValueError(f"{name}: option {option} must be {accepted}, got {value}")
            values[option] = value
        return cls.Options(**values)

    def start(self) -> None:
        """Called once before the first step, with the data there, in the run's random stream."""

    # Whether all steps do the same work: moves draw by `run` alone, ask no tensor for its value, and keep nothing for
    # the next step but what networks, optimisers and `carried` hold.
    same_work = False
    # A module whose buffers go on from step to step, in place, beside networks and optimisers.
    carried: nn.Module | None = None

    def begin(self, step: int) -> bool:
        """Called before each step (from 0); True makes optimisers begin anew, remembering nothing."""
        return False

    def work(self) -> Hashable | None:
        """What the coming step's work depends on beside the values of tensors: two steps of one value launch the same
        kernels on the same numbers of the host's, so that the second may be a CUDA graph. None: that is not known."""
        return () if self.same_work else None

    def moves(self) -> Iterator[tuple[str, Loss]]:
        """The moves of one step: who, and what he minimises."""
        raise NotImplementedError

    def average(self) -> nn.Module:
        """The network whose samples are shown: the moving average of ``averaged``, where one is kept.

        Raises ``ValueError`` where the game draws its samples itself: ``pictures`` has them.
        """
        if self.averaged is None:
            raise ValueError(f"{self.config.model} has no network that makes samples of latents alone")
        return self.shown if self.shown is not None else self.networks[self.averaged]

    shown: nn.Module | None = None  # the moving average, put there by the loop

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it all networks are in evaluation mode, and nothing has a gradient; then all is as before."""
        networks = [*self.networks.values(), *([] if self.shown is None else [self.shown])]
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(evaluating(network))
            with torch.no_grad():
                yield

    def pictures(self) -> dict[str, Picture]:
        """What is drawn at each checkpoint, always of the same latents; the first one is ``samples.png``."""
        return {}

    # What `gankern sample` draws of a game that can: a method each, which a game has or has not.
    DRAWS: ClassVar[Mapping[str, str]] = {
        "draw_sweep": "codes to sweep",  # (code, seed) -> Picture
        "draw_classes": "classes to draw a grid of",  # (label or None, seed) -> Picture
        "draw_captions": "captions",  # (texts, seed) -> Picture
        "coding": "an encoder",  # () -> functions images -> codes and codes -> images, made by `quietly`
    }

    def quietly(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A function of a batch as one of any number, in evaluation mode, from the CPU to the CPU."""

        def quiet(batch: Tensor) -> Tensor:
            with self.evaluating():
                return torch.cat([function(part.to(self.run.device)).cpu() for part in batch.split(250)])

        return quiet

    def able(self, method: str) -> Any:
        """One of the methods of ``DRAWS``; a ValueError that says which games have it."""
        found = getattr(self, method, None)
        if found is None:
            from gankern import games

            having = [name for name in games.names() if hasattr(games.find(name), method)]
            what = self.DRAWS[method].removeprefix("an ")
            raise ValueError(
                f"{self.config.model} has no {what}; {', '.join(having)} {'have' if len(having) > 1 else 'has'}"
            )
        return found

    @classmethod
    def evaluator(cls, config: Config, samples: Samples, condition: Any = None) -> Callable[[Any], Figures]:
        """A function game -> figures of merit, made once for all sides of a comparison."""
        return lambda game: game.figures()

    def figures(self) -> Figures:
        """Figures of merit, by name."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides networks and optimisers: tensors, numbers and strings."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """What :meth:`extra_state` gave, put back."""
