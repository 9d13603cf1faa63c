"""One GAN in training: its two networks, their optimisers, its batches and its random stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from gankern import data, losses, models
from gankern.data import EndlessBatches
from gankern.training import growth
from gankern.training.config import OPTIMISERS, Config
from gankern.training.penalty import GRADIENT_PENALTIES


@dataclass(frozen=True)
class Step:
    """What one step gave: the losses before the update, and the time of the two halves."""

    d_loss: float
    g_loss: float
    d_seconds: float
    g_seconds: float


class Trainer:
    """Trains one GAN on ``images`` [N, C, H, W], with the set of ``layers`` that is named.

    Two trainers of one configuration see the same initial weights, batches and latents, whatever else draws
    random numbers in the process: each has a random stream of its own, which is torch's global one only while
    it works.

    >>> from gankern import data, training
    >>> images = data.load("digits")
    >>> trainer = Trainer(training.configure("sn_dcgan", "digits", images), "torch", images)
    >>> trainer.step().d_loss < 3.0
    True
    """

    def __init__(self, config: Config, layers: str, images: Tensor):
        self.config = config
        self.device = torch.device(config.device)
        self.loss = losses.get(config.loss, config.real_target)
        self.gradient_penalty = GRADIENT_PENALTIES[layers]
        self.steps = 0
        self.batches = EndlessBatches(images.to(self.device), config.batch_size, config.seed)

        self.random_state = torch.Generator().manual_seed(config.seed).get_state()
        with self._own_random_stream():
            gan = models.build(
                config.model,
                size=config.size,
                channels=config.channels,
                latent=config.latent,
                width=config.width,
                layers=layers,
            )
        self.generator = gan.generator.to(self.device)
        self.discriminator = gan.discriminator.to(self.device)

        self._new_optimisers()
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(self.generator, avg_fn=self._moving_average)
        self._grow()

    def _new_optimisers(self) -> None:
        config = self.config
        options = {"betas": (config.beta1, config.beta2)} if config.optimiser == "adam" else {}
        make = OPTIMISERS[config.optimiser]
        self.g_optimiser = make(self.generator.parameters(), lr=config.lr, **options)
        self.d_optimiser = make(self.discriminator.parameters(), lr=config.lr, **options)

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
            start = self._now()
            for _ in range(self.config.n_critic):
                d_loss = self._discriminator_step(next(self.batches))
            middle = self._now()
            g_loss = self._generator_step()
            end = self._now()
        self.steps += 1
        return Step(d_loss.item(), g_loss.item(), middle - start, end - middle)

    def _discriminator_step(self, real: Tensor) -> Tensor:
        config = self.config
        if config.grow_steps:
            real = models.fade(data.resize(real, self.discriminator.resolution), self.discriminator.alpha)
        with torch.no_grad():
            fake = self.generator(self._latents())
        penalty = 0.0
        if config.gradient_penalty:  # first, so that its graph is gone before the next one is made
            alpha = torch.rand(len(real)).to(self.device)
            penalty = self.gradient_penalty(self.discriminator, real, fake, weight=config.gradient_penalty, alpha=alpha)
        real_logits = self.discriminator(real)
        loss = self.loss.discriminator(real_logits, self.discriminator(fake)) + penalty
        if config.drift:
            loss = loss + config.drift * real_logits.square().mean()
        self.d_optimiser.zero_grad()
        loss.backward()
        self.d_optimiser.step()
        if config.clip is not None:
            losses.clip_weights_(self.discriminator.parameters(), config.clip)
        return loss.detach()

    def _generator_step(self) -> Tensor:
        loss = self.loss.generator(self.discriminator(self.generator(self._latents())))
        self.g_optimiser.zero_grad()
        # Naming the inputs spares the discriminator's weight gradients, which nobody would use.
        loss.backward(inputs=list(self.generator.parameters()))
        self.g_optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.generator)
        return loss.detach()

    def _latents(self) -> Tensor:
        # Drawn on the CPU, so that a seed means the same latents on every device.
        return torch.randn(self.config.batch_size, self.config.latent).to(self.device)

    def _moving_average(self, average: Tensor, current: Tensor, updates: Tensor) -> Tensor:
        # A short memory at first, so that the random initial weights are soon forgotten.
        decay = min(self.config.ema, (1 + int(updates)) / (10 + int(updates)))
        return torch.lerp(average, current, 1.0 - decay)

    @torch.no_grad()
    def sample(self, latents: Tensor) -> Tensor:
        """Images for ``latents`` [N, latent], on the CPU, from the averaged generator if there is one."""
        network = self.generator if self.average is None else self.average
        network.eval()
        images = network(latents.to(self.device)).cpu()
        network.train()
        return images

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
        names = ["generator", "discriminator", "g_optimiser", "d_optimiser", "batches"]
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
