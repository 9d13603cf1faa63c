"""A run on several processes, which share every batch: gradients are averaged, and one process writes.

All processes draw the same random numbers for the whole batch, and each takes its part. So a run has the numbers
that one process has with the same batch, except where a layer couples the samples of a batch (batch norm in training
mode, minibatch standard deviation, minibatch discrimination): such a layer sees its own process's part, or, after
``couple_globally``, the whole batch.

Gradients are averaged by one all-reduce for each step of an optimiser, and not by DistributedDataParallel, which counts
on one forward for each backward and on every parameter having a gradient. A critic's step is three forwards and one
backward, a generator's step leaves the critic without gradients, and a growing network has parameters that wait.
"""

import atexit
import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from gankern.core import extras
from gankern.nn.coupling import coupled_layers, unknown_layers


class Processes:
    """One process alone, which is what ``start`` gives where nobody launched several."""

    rank = 0
    number = 1

    def __init__(self, device: str):
        self.device = torch.device(device)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every gradient becomes the mean over the processes."""

    def mean(self, value: Tensor) -> Tensor:
        return value

    def largest(self, number: int) -> int:
        """The largest number that a process has: what all have to agree on."""
        return int(number)


class Launched(Processes):
    """One of several processes that torchrun or Slurm launched, connected by lightning-fabric."""

    def __init__(self, device: str):
        Fabric = extras.load("lightning_fabric", "a run on several processes").Fabric
        local, nodes = _layout()
        accelerator = torch.device(device).type
        self.fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=nodes, strategy="ddp")
        self.fabric.launch()
        atexit.register(_leave)
        self.device = self.fabric.device
        self.rank, self.number = self.fabric.global_rank, self.fabric.world_size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        flat = self._reduced(flat, "mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def mean(self, value: Tensor) -> Tensor:
        return self._reduced(value.clone(), "mean")

    def largest(self, number: int) -> int:
        return int(self._reduced(torch.tensor(int(number), device=self.device), "max"))

    def _reduced(self, value: Tensor, how: str) -> Tensor:
        result = self.fabric.all_reduce(value, reduce_op=how)
        assert isinstance(result, Tensor)  # as the value is
        return result


def _leave() -> None:
    """Ends the connection: a process aborts that exits with gloo's threads alive, or while another talks to them."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        with suppress(RuntimeError):  # the others are gone already
            dist.monitored_barrier(timeout=timedelta(seconds=10))
    dist.destroy_process_group()


def start(device: str) -> Processes:
    """This process's place among those that torchrun or Slurm launched, or alone."""
    return Launched(device) if _launched() > 1 else Processes(device)


def _launched() -> int:
    environment = os.environ
    if "WORLD_SIZE" in environment and "LOCAL_RANK" in environment:
        return int(environment["WORLD_SIZE"])
    # A shell inside an allocation has the number of tasks too; srun's steps are named otherwise.
    if "SLURM_PROCID" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(environment.get("SLURM_NTASKS", 1))
    return 1


def _layout() -> tuple[int, int]:
    """Processes on each machine, and machines."""
    environment = os.environ
    if "LOCAL_WORLD_SIZE" in environment:
        local = int(environment["LOCAL_WORLD_SIZE"])
        return local, int(environment["WORLD_SIZE"]) // local
    nodes = int(environment.get("SLURM_NNODES", 1))
    return int(environment["SLURM_NTASKS"]) // nodes, nodes


class _Gather(Function):
    """[n, ...] of every process → [processes · n, ...]. In backward, each process's part of the sum of all gradients.

    Backward is itself differentiable, for a gradient penalty.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumScatter.apply(grad)


class _SumScatter(Function):
    """[processes · n, ...] of every process → this process's [n, ...] of their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Gather.apply(grad)


def couple_globally(network: nn.Module) -> nn.Module:
    """Makes every batch-coupled layer, while it trains, see the batches of all processes: in their order, as one.

    Their inputs are gathered, every process computes the layer for all samples and goes on with its own. It costs the
    exchange of feature maps; the numbers are those of one process with the whole batch, to any order of gradient.

    Raises: ValueError where it is not known of a layer whether it couples the samples of a batch.
    """
    unknown = unknown_layers(network)
    if unknown:
        name, reason = next(iter(unknown.items()))
        raise ValueError(
            f"coupled='global': layer {name!r} of {type(network).__name__} may couple the samples of a batch: {reason}"
            f"; say it of its class with gankern.nn.coupling.apart or .coupled"
        )

    def gather(layer: nn.Module, inputs: tuple) -> tuple:
        return tuple(_Gather.apply(x) for x in inputs) if layer.training else inputs

    def take_own(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output.chunk(dist.get_world_size())[dist.get_rank()] if layer.training else output

    for layer in coupled_layers(network).values():
        layer.register_forward_pre_hook(gather)
        layer.register_forward_hook(take_own)
    return network
