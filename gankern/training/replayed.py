"""A trainer's steps as CUDA graphs, wherever that is possible: :class:`GraphedStep` for the games of this library.

What a step draws, batches and latents, comes from the host, and cannot be in a graph. The game says what its work
depends on (``Game.work``). A step of a new value runs as ever, and what it draws is written down: which draws, in which
order. The next step of that value makes these draws first, into tensors, and is captured with them as its inputs; later
ones are replayed. So the random stream, the batches and the numbers are those of steps without graphs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gankern.training.graphed import GraphedStep, NotCaptured

if TYPE_CHECKING:
    from gankern.training.trainer import Trainer

log = logging.getLogger("gankern")

VARIABLE = "GANKERN_CUDA_GRAPHS"  # set to 0, no step is a graph


def refusal(trainer: Trainer) -> str | None:
    """Why a trainer's steps are not replayed; None where they are. Networks and optimisers are not asked for."""
    config = trainer.config
    kinds = {player.optimiser or config.optimiser for player in trainer.game.players.values()}
    if trainer.device.type != "cuda":
        return f"CUDA graphs are for CUDA devices, this run is on {trainer.device}"
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0 is set"
    if trainer.processes.number > 1:
        return "the gradients of several processes are averaged within a step"
    if trainer.game.work() is None:
        return f"with these options a step of {config.model} is not known to do the same work each time"
    if "sgd" in kinds:
        return "SGD takes its learning rate and momentum from the host"
    if config.precision == "fp16" and kinds != {"adam"}:
        return "with fp16 only Adam goes on without asking the device whether a gradient is finite"
    return None


class Replays:
    """The steps of a trainer that :func:`refusal` does not refuse."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.run = trainer, trainer.game.run
        self.forget()

    def forget(self) -> None:
        """Drops all graphs: what they read is about to be replaced."""
        self.draws: dict[Hashable, list[Callable[[], Any]]] = {}
        self.graphed: GraphedStep | None = None
        self.structure: Any = None

    def play(self) -> dict[str, Tensor] | None:
        """The moves of a step: each player's loss. None where the step is not replayed, nor can be."""
        trainer = self.trainer
        work = trainer.game.work()
        if work is None:
            return None
        if work not in self.draws:
            self.draws[work] = []
            return self._while(self._write_down(self.draws[work]))
        inputs, self.structure = tree_flatten([draw() for draw in self.draws[work]])
        if self.graphed is None:
            networks, optimisers = [*trainer.game.networks.values()], [*trainer.optimisers.values()]
            networks += [] if trainer.game.carried is None else [trainer.game.carried]
            scalers = [s for s in trainer.scalers.values() if s.is_enabled()]
            depends = trainer.game.work
            self.graphed = GraphedStep(self._step, inputs, networks, optimisers, scalers=scalers, depends_on=depends)
        self.graphed.captured.setdefault(work, None)  # the step that was written down was the first one
        try:
            return self.graphed(*inputs)
        except NotCaptured as error:
            log.warning("steps are not replayed as CUDA graphs: %s", str(error).splitlines()[0])
            trainer.replays = None
            return self._step(*inputs)

    def _step(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self._while(self._give(iter(tree_unflatten(inputs, self.structure))))

    def _while(self, drawn: Callable[[Callable[[], Any]], Any]) -> dict[str, Tensor]:
        self.run.drawn = drawn
        try:
            losses, _ = self.trainer.play(timed=False)
        finally:
            self.run.drawn = None
        return losses

    @staticmethod
    def _write_down(draws: list[Callable[[], Any]]) -> Callable[[Callable[[], Any]], Any]:
        def drawn(draw: Callable[[], Any]) -> Any:
            draws.append(draw)
            return draw()

        return drawn

    @staticmethod
    def _give(values: Iterator[Any]) -> Callable[[Callable[[], Any]], Any]:
        return lambda draw: next(values)


def capturable(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """An optimiser's options, for a step that is captured: the rate is a tensor, which changes in place."""
    return options | {"lr": torch.tensor(options["lr"], device=device), "capturable": device.type == "cuda"}


def plain_options(state: dict[str, Any], rate: float) -> dict[str, Any]:
    """An optimiser's state with the options of one whose steps are not captured: what a checkpoint holds. ``rate`` is
    what the tensor, in single precision, stands for."""
    (group,) = state["param_groups"]
    if not isinstance(group["lr"], Tensor):
        return state
    own = group | {"lr": rate} | ({"capturable": False} if "capturable" in group else {})
    return state | {"param_groups": [own]}


def take_options(optimiser: torch.optim.Optimizer, options: dict[str, Any]) -> None:
    """Puts the options of a step that is captured back into an optimiser that was loaded, but for its rate's value."""
    (group,) = optimiser.param_groups
    rate = options["lr"]
    if isinstance(rate, Tensor):
        group["lr"], group["capturable"] = rate.fill_(float(group["lr"])), options["capturable"]
        for parameter, kept in optimiser.state.items():
            if group["capturable"]:  # which RMSprop else has on the CPU
                kept["step"] = kept["step"].to(parameter.device)
