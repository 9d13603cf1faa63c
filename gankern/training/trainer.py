"""One game in training: its networks, their optimisers, its batches and its random stream."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gankern import games, models
from gankern.core.arguments import real, shown, tensor, whole
from gankern.data import EndlessBatches, EndlessPoints, Points
from gankern.data.batches import part_of
from gankern.games import Run
from gankern.games._config import COUPLINGS, OPTIMISERS, PRECISIONS, Config, check_condition, check_here, taken
from gankern.models import layers as layer_tables
from gankern.models.conditional import CONDITIONINGS
from gankern.nn import coupling
from gankern.training import parallel, replayed

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True)
class Step:
    """What one step gave, by player: the loss before his last update, and the time that his moves took."""

    losses: dict[str, float]
    seconds: dict[str, float]

    @property
    def d_loss(self) -> float:
        """Of a game whose players are called "d" and "g", the discriminator's loss; likewise the next."""
        return self.losses["d"]

    @property
    def g_loss(self) -> float:
        return self.losses["g"]


class Trainer:
    """Plays the game of ``config`` on images [N, C, H, W], or points, with the set of ``layers`` that is named.

    Two trainers of one configuration see the same initial weights, batches and latents, whatever else draws
    random numbers in the process: each has a random stream of its own, which is torch's global one only while
    it works. ``labels`` [N, ...] are the images', or another condition, for a game that needs one. With several
    ``processes`` each has a trainer, and they share every batch.

    >>> from gankern import data, training
    >>> images = data.load("digits")
    >>> trainer = Trainer(training.configure("sn_dcgan", "digits", images), "torch", images)
    >>> trainer.step().d_loss < 3.0
    True
    """

    def __init__(
        self,
        config: Config,
        layers: str,
        samples: Any,
        labels: Any = None,
        processes: parallel.Processes | None = None,
    ):
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config, got {shown(config)}")
        check_here(config)
        self.config = config
        layer_tables.get(layers)
        samples, labels = taken(config.model, config.conditioning, samples, labels)
        if config.conditioning is not None and not isinstance(samples, Points):
            labels = check_condition(CONDITIONINGS[config.conditioning], labels, len(samples), config.num_classes)
        self.processes = processes or parallel.Processes(config.device)
        self.device = self.processes.device
        self.steps = 0
        kind = games.find(config.model)
        self._divide_batches(kind.accumulates)
        share = (self.processes.rank, self.processes.number)
        condition = None
        if labels is not None and (config.conditioning is not None or kind.needs is not None):
            condition = labels.to(self.device)
        run = Run(config, layers, self.device, share, samples, condition, mean=self.processes.mean)
        if isinstance(samples, Points):
            self.batches: Any = EndlessPoints(samples, config.batch_size, config.seed, share)
        else:
            if kind.held_out:
                chosen, _ = run.held_out(kind.held_out)
                samples, condition = samples[chosen], None if condition is None else condition[chosen]
            self.batches = EndlessBatches(
                samples.to(self.device),
                config.batch_size,
                config.seed,
                labels=condition,
                share=share,
                workers=config.workers,
            )
        run.batches = self.batches

        self.random_state = torch.Generator().manual_seed(config.seed).get_state()
        with self._own_random_stream():
            try:
                self.game = kind(run)
            except models.SizeError as error:
                raise ValueError(f"{error}. --size N --resize resizes the images of {config.data}") from error
            # Convolutions in 16 bits run on images whose channels lie last.
            last = self.device.type == "cuda" and PRECISIONS[config.precision] is not None
            for network in self.game.networks.values():
                network.to(self.device)
                if last:
                    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
            self.game.start()
        if config.accumulate > 1:
            self._warn_of_parts()
        if self.processes.number > 1 and COUPLINGS[config.coupled]:
            for network in self.game.networks.values():
                parallel.couple_globally(network)

        # Where this is None, ``not_replayed`` says why.
        self.not_replayed = replayed.refusal(self)
        self.replays = None if self.not_replayed else replayed.Replays(self)
        self._new_optimisers()
        # fp16 has no room for small gradients: they are computed of a loss that is scaled up.
        scaled = config.precision == "fp16"
        self.scalers = {p: torch.amp.GradScaler(self.device.type, enabled=scaled) for p in self.game.players}
        self.average = None
        if config.ema is not None and self.game.averaged is not None:
            original = self.game.networks[self.game.averaged]
            self.average = self.game.shown = AveragedModel(original, multi_avg_fn=self._moving_average)
        self.game.begin(0)

    @property
    def generator(self) -> nn.Module:
        return self.game.networks["generator"]

    @property
    def discriminator(self) -> nn.Module:
        return self.game.networks["discriminator"]

    def sample(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples of the generator, for a game that draws from latents: see :meth:`Adversarial.sample`."""
        game: Any = self.game
        return game.sample(latents, labels)

    def _divide_batches(self, accumulates: bool) -> None:
        batch_size, parts = self.config.batch_size, self.processes.number * self.config.accumulate
        if self.config.accumulate > 1 and not accumulates:
            raise ValueError(f"{self.config.model} cannot divide its batch: accumulate must be 1")
        if batch_size % parts:
            raise ValueError(
                f"a batch of {batch_size} does not go evenly into {self.processes.number} processes times "
                f"{self.config.accumulate} parts: take a batch_size that is a multiple of {parts}"
            )

    def _warn_of_parts(self) -> None:
        """Parts of a batch have the numbers of the whole where nothing couples its samples."""
        found = [
            f"{name or 'itself'} of the {network_name}"
            for network_name, network in self.game.networks.items()
            for name in (*coupling.coupled_layers(network), *coupling.unknown_layers(network))
        ]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            warnings.warn(
                f"accumulate is {self.config.accumulate}: {found[0]}{more} couples the samples of a batch, or may, and "
                f"sees a part of each: other numbers than those of the whole batch",
                stacklevel=3,
            )

    def parameters(self, player: str) -> list[nn.Parameter]:
        """What a player's optimiser steps."""
        networks = [self.game.networks[name] for name in self.game.players[player].networks]
        return list(dict.fromkeys(p for network in networks for p in network.parameters()))

    def _new_optimisers(self) -> None:
        self.optimisers = self.game.optimisers = {}
        self.stepped: dict[str, list[nn.Parameter]] = {}  # found once: on small networks looking is a part of a step
        self.rates: dict[str, float] = {}
        for name, player in self.game.players.items():
            kind = player.optimiser or self.config.optimiser
            options: dict[str, Any] = {"lr": player.lr or self.config.lr}
            if kind == "adam":
                options |= {"betas": player.betas or (self.config.beta1, self.config.beta2), "fused": True}
            self.rates[name] = options["lr"]
            if self.replays is not None:
                options = replayed.capturable(options, self.device)
            self.stepped[name] = self.parameters(name)
            self.optimisers[name] = OPTIMISERS[kind](self.stepped[name], **options)

    def _set_rates(self) -> None:
        """The learning rates and momenta of the coming step."""
        config, steps = self.config, self.steps
        left = max(0.0, 1.0 - steps / config.decay_steps) if config.decay_steps else 1.0
        try:
            divisor = config.lr_decay**steps
        except OverflowError:  # nothing is left of them
            divisor = inf
        momentum = config.momentum
        if config.momentum_end is not None:
            momentum += (config.momentum_end - momentum) * min(1.0, steps / config.momentum_steps)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                lr = self.game.players[name].lr or config.lr
                if left != 1.0 or config.lr_decay != 1.0:
                    lr = max(lr * left / divisor, config.lr_floor)
                self.rates[name] = lr
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
                if "dampening" in group:  # SGD; RMSprop's momentum is another, and stays 0
                    group["momentum"] = momentum

    def step(self) -> Step:
        """The moves of one step of the game."""
        with self._own_random_stream():
            if self.game.begin(self.steps):
                if self.replays is not None:
                    self.replays.forget()
                self._new_optimisers()
            self._set_rates()
            start = self._now()
            losses = self.replays.play() if self.replays is not None else None
            if losses is not None:
                # Of a graph there is but one time.
                seconds = dict.fromkeys(self.game.players, (self._now() - start) / len(self.game.players))
            else:
                with self._told_of_batches_of_one():
                    losses, seconds = self.play()
            if self.average is not None and self.game.averaged is not None:
                self.average.update_parameters(self.game.networks[self.game.averaged])
        self.steps += 1
        none = torch.zeros((), device=self.device)  # of a player who did not move
        values = self.processes.mean(torch.stack([losses.get(name, none) for name in self.game.players])).tolist()
        return Step(dict(zip(self.game.players, values)), seconds)

    @contextmanager
    def _told_of_batches_of_one(self) -> Iterator[None]:
        """Names the option, where a batch norm has one sample of one pixel: it names itself and what it got."""
        try:
            yield
        except ValueError as error:
            parts = self.processes.number * self.config.accumulate
            if self.config.batch_size > parts or "more than 1 value per channel" not in str(error):
                raise
            each = f": each of {parts} parts of it is one sample" if parts > 1 else ""
            raise ValueError(
                f"batch_size must be at least {2 * parts} for {self.config.model}, got {self.config.batch_size}{each}, "
                f"and batch norm needs more than one ({error})"
            ) from error

    def play(self, timed: bool = True) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The moves of a step, within its random stream: losses, and the players' times, for which it waits."""
        losses: dict[str, Tensor] = {}
        seconds = dict.fromkeys(self.game.players, 0.0)
        moves, start = self.game.moves(), self._now() if timed else 0.0
        while True:
            with self._autocast():
                move = next(moves, None)
            if move is None:
                return losses, seconds
            player, loss = move
            losses[player] = self._minimise(player, loss)
            end = self._now() if timed else 0.0
            seconds[player] += end - start
            start = end

    def _minimise(self, player: str, loss: Tensor | Callable[[slice], Tensor]) -> Tensor:
        """One step of a player's optimiser on his loss, for a function the mean of it over the parts of this process's
        part of the batch; and its value."""
        parameters, optimiser, scaler = self.stepped[player], self.optimisers[player], self.scalers[player]
        optimiser.zero_grad()
        total = torch.zeros((), device=self.device)
        number = 1 if isinstance(loss, Tensor) else self.config.accumulate
        for i in range(number):
            if isinstance(loss, Tensor):
                value = loss
            else:
                with self._autocast():
                    value = loss(part_of(self.config.batch_size // self.processes.number, (i, number)))
            # Naming the inputs spares the other players' weight gradients, which nobody would use.
            scaler.scale(value / number).backward(inputs=parameters)
            total += value.detach() / number
        self.processes.average_gradients(parameters)
        scaler.step(optimiser)
        scaler.update()
        return total

    def _autocast(self) -> AbstractContextManager:
        dtype = PRECISIONS[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _moving_average(self, averages: Tensors, currents: Tensors, updates: Tensor | int) -> None:
        assert self.config.ema is not None
        # A short memory at first, so that the random initial weights are soon forgotten.
        decay = min(self.config.ema, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(decay)(averages, currents, updates)

    def is_finite(self) -> bool:
        """Whether every parameter and buffer of all networks, and of the average that is shown, is finite."""
        networks = [*self.game.networks.values(), *([] if self.average is None else [self.average])]
        return all(bool(tensor.isfinite().all()) for network in networks for tensor in network.state_dict().values())

    def state_dict(self) -> dict:
        """All that the following steps depend on."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        for name in self.optimisers:
            state[f"{name}_optimiser"] = replayed.plain_options(state[f"{name}_optimiser"], self.rates[name])
        extra = self.game.extra_state()
        return state | {"random_state": self.random_state, "steps": self.steps} | ({"extra": extra} if extra else {})

    def load_state_dict(self, state: dict) -> None:
        """Raises KeyError, ValueError, TypeError or RuntimeError for a state that is none of such a trainer."""
        parts = self._parts()
        expected = {*parts, "random_state", "steps", *(["extra"] if self.game.extra_state() else [])}
        if state.keys() != expected:
            missing, unknown = sorted(expected - state.keys()), sorted(map(str, state.keys() - expected))
            raise ValueError(f"missing: {', '.join(missing) or 'nothing'}; unknown: {', '.join(unknown) or 'nothing'}")
        steps = whole("steps", state["steps"], least=0)
        torch.Generator().set_state(tensor("random_state", state["random_state"]))  # which checks it
        optimisers = {f"{name}_optimiser": optimiser for name, optimiser in self.optimisers.items()}
        options = {name: dict(optimiser.param_groups[0]) for name, optimiser in optimisers.items()}
        for name, part in parts.items():
            if not isinstance(state[name], dict):
                raise TypeError(f"{name} must be a dict, got {shown(state[name])}")
            part.load_state_dict(state[name])
        if self.replays is not None:
            self.replays.forget()
        for name, optimiser in self.optimisers.items():
            self.rates[name] = optimiser.param_groups[0]["lr"]
            replayed.take_options(optimiser, options[f"{name}_optimiser"])
        for name, optimiser in optimisers.items():
            _check_optimiser(name, optimiser, options[name])
        if not self.is_finite():
            raise ValueError("a weight is not finite")
        self.random_state = state["random_state"]
        self.steps = steps
        self.game.load_extra_state(state.get("extra", {}))

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = dict(self.game.networks)
        for name in self.game.players:
            parts |= {f"{name}_optimiser": self.optimisers[name], f"{name}_scaler": self.scalers[name]}
        return parts | {"batches": self.batches} | ({} if self.average is None else {"average": self.average})

    @contextmanager
    def _own_random_stream(self) -> Iterator[None]:
        others = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(others)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


# Of each parameter.
KEPT = {"adam": {"step", "exp_avg", "exp_avg_sq"}, "rmsprop": {"step", "square_avg"}, "sgd": {"momentum_buffer"}}


def _check_optimiser(name: str, optimiser: torch.optim.Optimizer, options: dict) -> None:
    """Raises unless an optimiser that was loaded has this run's ``options``, and keeps what its step counts on."""
    (group,) = optimiser.param_groups
    for option in options.keys() & group.keys() - {"params", "lr", *({"momentum"} if "dampening" in group else ())}:
        if group[option] != options[option]:
            raise ValueError(f"{name}: {option} must be {options[option]}, got {shown(group[option])}")
    rate = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
    if not 0.0 <= real(f"{name}: lr", rate) < float("inf"):
        raise ValueError(f"{name}: lr must be 0 or more, got {group['lr']}")
    expected = KEPT[type(optimiser).__name__.lower()]
    for parameter, kept in optimiser.state.items():
        if kept.keys() != expected:
            raise ValueError(
                f"{name}: of a parameter it must keep {', '.join(sorted(expected))}, got {', '.join(kept)}"
            )
        for key, value in kept.items():
            shape = () if key == "step" else parameter.shape  # fused kernels count on that
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"{name}: {key} must be a tensor {tuple(shape)}, got {shown(value)}")
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name}: {key} is not finite")
