"""One GAN in training: its two networks, their optimisers, its batches and its random stream."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gankern.nn as gnn
from gankern import data, losses, models
from gankern.data import EndlessBatches, EndlessPoints, ImageSource, Points
from gankern.data.batches import part_of
from gankern.training import growth, parallel
from gankern.training.config import COUPLINGS, OPTIMISERS, PRECISIONS, Config
from gankern.training.critic import DISCRIMINATOR_LOSSES, Objective

REFERENCE = 64  # samples of virtual batch norm's reference batch


@dataclass(frozen=True)
class Step:
    """What one step gave: the losses before the update, and the time of the two halves."""

    d_loss: float
    g_loss: float
    d_seconds: float
    g_seconds: float


class Trainer:
    """Trains one GAN on images [N, C, H, W], or points, with the set of ``layers`` that is named.

    Two trainers of one configuration see the same initial weights, batches and latents, whatever else draws
    random numbers in the process: each has a random stream of its own, which is torch's global one only while
    it works. ``labels`` [N] are the images', for a model that is conditional on them. With several ``processes`` each
    has a trainer, and they share every batch.

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
        samples: Tensor | ImageSource | Points,
        labels: Tensor | None = None,
        processes: parallel.Processes | None = None,
    ):
        self.config = config
        self.processes = processes or parallel.Processes(config.device)
        self.device = self.processes.device
        self.loss = losses.get(config.loss, config.real_target)
        self.objective = Objective(self.loss, config.gradient_penalty, config.drift)
        self.discriminator_loss = DISCRIMINATOR_LOSSES[layers]
        self.steps = 0
        self._divide_batches()
        share = (self.processes.rank, self.processes.number)
        self.labels = None if config.conditioning is None else labels.to(self.device)
        if isinstance(samples, Points):
            self.batches = EndlessPoints(samples, config.batch_size, config.seed, share)
        else:
            self.batches = EndlessBatches(
                samples.to(self.device), config.batch_size, config.seed, labels=self.labels, share=share
            )

        self.random_state = torch.Generator().manual_seed(config.seed).get_state()
        with self._own_random_stream():
            try:
                gan = models.build(config.model, layers=layers, **config.architecture())
            except models.SizeError as error:
                raise ValueError(f"{error}. --size N --resize resizes the images of {config.data}") from error
            self.generator = gan.generator.to(self.device)
            self.discriminator = gan.discriminator.to(self.device)
            self._set_reference_batches(samples)
        if self.processes.number > 1 and COUPLINGS[config.coupled]:
            for network in (self.generator, self.discriminator):
                parallel.couple_globally(network)

        self._new_optimisers()
        # fp16 has no room for small gradients: they are computed of a loss that is scaled up.
        scaled = config.precision == "fp16"
        self.g_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.d_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(self.generator, multi_avg_fn=self._moving_average)
        self._grow()

    def _divide_batches(self) -> None:
        batch_size, parts = self.config.batch_size, self.processes.number * self.config.accumulate
        if batch_size % parts:
            raise ValueError(
                f"a batch of {batch_size} does not go evenly into {self.processes.number} processes times "
                f"{self.config.accumulate} parts: take a batch_size that is a multiple of {parts}"
            )

    def _set_reference_batches(self, samples: Tensor | ImageSource | Points) -> None:
        """The batches that virtual batch norm's statistics are of, if there is such a layer."""
        config = self.config
        for network, norm in ((self.generator, config.generator_norm), (self.discriminator, config.discriminator_norm)):
            # At 8×8, DCGAN's discriminator has no layer that is normalised.
            if norm != "virtual" or not any(isinstance(m, gnn.VirtualBatchNorm2d) for m in network.modules()):
                continue
            chosen = torch.randint(len(samples), (REFERENCE,))
            batch = self._drawn_latents(REFERENCE) if network is self.generator else samples[chosen].to(self.device)
            labels = () if self.labels is None else (self.labels[chosen],)
            gnn.set_reference_batch(network, batch, *labels)

    def _new_optimisers(self) -> None:
        config = self.config
        options = {"betas": (config.beta1, config.beta2), "fused": True} if config.optimiser == "adam" else {}
        make = OPTIMISERS[config.optimiser]
        self.g_optimiser = make(self.generator.parameters(), lr=config.lr, **options)
        self.d_optimiser = make(self.discriminator.parameters(), lr=config.lr, **options)

    def _set_learning_rates(self) -> None:
        if not self.config.decay_steps:
            return
        lr = self.config.lr * max(0.0, 1.0 - self.steps / self.config.decay_steps)
        for optimiser in (self.g_optimiser, self.d_optimiser):
            for group in optimiser.param_groups:
                group["lr"] = lr

    def _grow(self) -> None:
        """The resolution of the coming step; a new one begins with optimisers that remember nothing (Karras 2018)."""
        if not self.config.grow_steps:
            return
        resolution, alpha = growth.stage(self.steps, self.config.grow_steps, self.config.size)
        if resolution != self.discriminator.resolution:
            self._new_optimisers()
        networks = [self.generator, self.discriminator]
        for network in networks + ([self.average.module] if self.average is not None else []):
            network.resize(resolution, alpha)

    def step(self) -> Step:
        """``n_critic`` discriminator steps, then one generator step."""
        with self._own_random_stream():
            self._grow()
            self._set_learning_rates()
            start = self._now()
            for _ in range(self.config.n_critic):
                d_loss = self._discriminator_step()
            middle = self._now()
            g_loss = self._generator_step()
            end = self._now()
        self.steps += 1
        d_loss, g_loss = self.processes.mean(torch.stack([d_loss, g_loss])).tolist()
        return Step(d_loss, g_loss, middle - start, end - middle)

    def _discriminator_step(self) -> Tensor:
        config = self.config
        batch = next(self.batches)
        real, *labels = batch if isinstance(batch, tuple) else (batch,)
        real = real.to(self.device)
        if config.grow_steps:
            real = models.fade(data.resize(real, self.discriminator.resolution), self.discriminator.alpha)
        latents = self._latents()
        alpha = self._own(torch.rand(config.batch_size)) if config.gradient_penalty else None

        def loss(part: slice) -> Tensor:
            labels_, alpha_ = tuple(x[part] for x in labels), None if alpha is None else alpha[part]
            with torch.no_grad():
                fake = self.generator(latents[part], *labels_).to(real.dtype)
            return self.discriminator_loss(self.discriminator, real[part], fake, alpha_, labels_, self.objective)

        result = self._minimise(loss, self.discriminator, self.d_optimiser, self.d_scaler)
        if config.clip is not None:
            losses.clip_weights_(self.discriminator.parameters(), config.clip)
        return result

    def _generator_step(self) -> Tensor:
        latents = self._latents()
        labels: list[Tensor] = []
        if self.labels is not None:
            labels = [self._own(self.labels[torch.randint(len(self.labels), (self.config.batch_size,))])]

        def loss(part: slice) -> Tensor:
            labels_ = tuple(x[part] for x in labels)
            return self.loss.generator(self.discriminator(self.generator(latents[part], *labels_), *labels_))

        result = self._minimise(loss, self.generator, self.g_optimiser, self.g_scaler)
        if self.average is not None:
            self.average.update_parameters(self.generator)
        return result

    def _minimise(
        self,
        loss: Callable[[slice], Tensor],
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> Tensor:
        """One step of an optimiser on the mean of the loss over this process's part of the batch, and its value."""
        optimiser.zero_grad()
        total = torch.zeros((), device=self.device)
        for i in range(self.config.accumulate):
            with self._autocast():
                value = loss(part_of(self.config.batch_size // self.processes.number, (i, self.config.accumulate)))
            # Naming the inputs spares the other player's weight gradients, which nobody would use.
            scaler.scale(value / self.config.accumulate).backward(inputs=list(network.parameters()))
            total += value.detach() / self.config.accumulate
        self.processes.average_gradients(network.parameters())
        scaler.step(optimiser)
        scaler.update()
        return total

    def _autocast(self) -> AbstractContextManager:
        dtype = PRECISIONS[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _drawn_latents(self, number: int) -> Tensor:
        # Drawn on the CPU, so that a seed means the same latents on every device.
        return torch.randn(number, self.config.latent).to(self.device)

    def _latents(self) -> Tensor:
        return self._own(self._drawn_latents(self.config.batch_size))

    def _own(self, batch: Tensor) -> Tensor:
        """This process's part of what was drawn for the whole batch."""
        return batch.to(self.device)[part_of(len(batch), (self.processes.rank, self.processes.number))]

    def _moving_average(self, averages: list[Tensor], currents: list[Tensor], updates: Tensor) -> None:
        # A short memory at first, so that the random initial weights are soon forgotten.
        decay = min(self.config.ema, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(decay)(averages, currents, updates)

    @torch.no_grad()
    def sample(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples for ``latents`` [N, latent], on the CPU, from the averaged generator if there is one."""
        network = self.generator if self.average is None else self.average
        network.eval()
        arguments = [x.to(self.device) for x in (latents, labels) if x is not None]
        samples = torch.cat([network(*parts) for parts in zip(*(x.split(256) for x in arguments))]).cpu()
        network.train()
        return samples

    def is_finite(self) -> bool:
        """Whether every parameter and buffer of both networks is finite."""
        state = [*self.generator.state_dict().values(), *self.discriminator.state_dict().values()]
        return all(bool(tensor.isfinite().all()) for tensor in state)

    def state_dict(self) -> dict:
        """All that the following steps depend on."""
        return {name: part.state_dict() for name, part in self._parts()} | {
            "random_state": self.random_state,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self.random_state = state["random_state"]
        self.steps = state["steps"]

    def _parts(self) -> list:
        names = ["generator", "discriminator", "g_optimiser", "d_optimiser", "g_scaler", "d_scaler", "batches"]
        names += ["average"] if self.average is not None else []
        return [(name, getattr(self, name)) for name in names]

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
