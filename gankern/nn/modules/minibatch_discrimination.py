"""Minibatch discrimination as a layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

import gankern.functional as GF
from gankern.functional import _checks


class _Collective(Function):
    """What all processes of a group do together: inputs are this one's tensor and the group."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.group = inputs[1]


class _Gather(_Collective):
    """The concatenation of all processes' tensors. Torch's own autograd-aware all_gather is deprecated as of 2.13, and
    what it names instead is not in 2.11."""

    @staticmethod
    def forward(m: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        parts = [torch.empty_like(m, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, m.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _SumAndScatter.apply(grad, ctx.group), None


class _SumAndScatter(_Collective):
    """This process's part of the sum of all processes' tensors: the transpose of _Gather, and the other way round."""

    @staticmethod
    def forward(grad: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        processes, rank = dist.get_world_size(group), dist.get_rank(group)
        if dist.get_backend(group) == "nccl":
            parts = [part.contiguous() for part in grad.chunk(processes)]
            own = torch.empty_like(parts[rank])
            dist.reduce_scatter(own, parts, group=group)
            return own
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.chunk(processes)[rank].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gather.apply(grad, ctx.group), None


class MinibatchDiscrimination(nn.Module):
    r"""Appends to each sample's features how close it is to the other samples of the batch.

    With :math:`M_{ibc} = \sum_a x_{ia} T_{abc}` and :math:`o_{ib} = \sum_{j \ne i} \exp(-\sum_c |M_{ibc} - M_{jbc}|)`
    the result is :math:`[x, o]`. A generator that makes the same picture over and over is then easily told from data.
    Real and generated samples go through the discriminator in batches of their own.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 3.2; the weight-normalised form is that of the authors'
    code (openai/improved-gan, ``MinibatchLayer``).

    Args:
        in_features: A, the size of each sample.
        num_kernels: B, the number of features appended.
        kernel_dim: C, the dimension of each kernel.
        include_self: count each sample's similarity to itself, which is 1.
        reduction: "sum", or "mean" over the terms of the sum.
        weight_norm: the authors' form, :math:`T_{abc} = \theta_{abc} e^{s_{bc}} / \lVert\theta_{\cdot bc}\rVert_2` and
            :math:`o + b`; see :meth:`initialize`.
        global_batch: discriminate against the samples of all processes of ``process_group``, as one process with the
            whole batch would. Needs an initialised torch.distributed, the same batch size in every process, and that
            all processes run the layer's forward and backward equally often.
        process_group: of torch.distributed, with ``global_batch``; None is the default group.
        implementation: see :mod:`gankern.functional`.

    Shape: x is [N, in_features], the result [N, in_features + num_kernels], of x's dtype.

    Parameters:
        T: [in_features, num_kernels, kernel_dim], drawn from N(0, 1): the name, shape and initialisation that most
            public PyTorch code has.
        With ``weight_norm`` instead: theta of T's shape, from N(0, 0.05); log_weight_scale [num_kernels,
        kernel_dim], 0; bias [num_kernels], -1.

    Gradient order: 2 (any order with implementation="reference").

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; RuntimeError with ``global_batch``
        where torch.distributed is not initialised.

    >>> layer = MinibatchDiscrimination(64, 20, 5)
    >>> layer(torch.randn(16, 64)).shape
    torch.Size([16, 84])
    """

    def __init__(
        self, in_features: int, num_kernels: int, kernel_dim: int, *, include_self: bool = False,
        reduction: str = "sum", weight_norm: bool = False, global_batch: bool = False,
        process_group: dist.ProcessGroup | None = None, implementation: str | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, size in (("in_features", in_features), ("num_kernels", num_kernels), ("kernel_dim", kernel_dim)):
            _checks.whole("MinibatchDiscrimination", name, size)
        _checks.choice("MinibatchDiscrimination", "reduction", reduction, ("sum", "mean"))
        if process_group is not None and not global_batch:
            raise ValueError("MinibatchDiscrimination: process_group is for global_batch=True, which is False")
        self.in_features, self.num_kernels, self.kernel_dim = in_features, num_kernels, kernel_dim
        self.include_self, self.reduction, self.weight_norm = include_self, reduction, weight_norm
        self.global_batch, self.process_group = global_batch, process_group
        self.implementation = _checks.implementation("MinibatchDiscrimination", implementation)
        kernel = torch.empty(in_features, num_kernels, kernel_dim, device=device, dtype=dtype)
        if weight_norm:
            self.theta = nn.Parameter(kernel)
            self.log_weight_scale = nn.Parameter(kernel.new_empty(num_kernels, kernel_dim))
            self.bias = nn.Parameter(kernel.new_empty(num_kernels))
        else:
            self.T = nn.Parameter(kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight_norm:
            nn.init.normal_(self.theta, 0, 0.05)
            nn.init.zeros_(self.log_weight_scale)
            nn.init.constant_(self.bias, -1)
        else:
            nn.init.normal_(self.T, 0, 1)

    def kernel(self) -> Tensor:
        """The tensor T that x is multiplied with, [in_features, num_kernels, kernel_dim]."""
        if not self.weight_norm:
            return self.T
        return self.theta * (self.log_weight_scale.exp() / torch.linalg.vector_norm(self.theta, dim=0))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """The authors' data-dependent initialisation, for ``weight_norm``: run it once, on a batch of what will reach
        the layer. It scales each kernel so that a sample's nearest other sample is at distance 2 on average, and sets
        the bias so that the appended features have mean 0.
        """
        if not self.weight_norm:
            raise ValueError("MinibatchDiscrimination: initialize() is for weight_norm=True, which is False")
        self._check(x)
        if len(x) < 2:
            raise ValueError(f"MinibatchDiscrimination: initialize() needs 2 samples or more, got {len(x)}")
        self.log_weight_scale.sub_((self._nearest(x) / 2).log().unsqueeze(1))
        self.bias.zero_()
        self.bias.copy_(-self(x)[:, self.in_features :].mean(0))

    def _nearest(self, x: Tensor) -> Tensor:
        """For each kernel the mean over the samples of the distance to the nearest other one."""
        m = (x @ self.kernel().flatten(1)).unflatten(1, (self.num_kernels, self.kernel_dim))
        nearest = m.new_empty(self.num_kernels)
        for b in range(self.num_kernels):  # one [N, N] at a time
            distance = torch.cdist(m[:, b], m[:, b], p=1).fill_diagonal_(float("inf"))
            nearest[b] = distance.amin(1).mean()
        if not (nearest > 0).all():
            raise ValueError("MinibatchDiscrimination: initialize() needs samples that differ, got equal or NaN ones")
        return nearest

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.global_batch:
            similarity = self._global(x, self.include_self, self.implementation)
        else:
            similarity = GF.minibatch_discrimination(
                x,
                self.kernel(),
                reduction=self.reduction,
                include_self=self.include_self,
                implementation=self.implementation,
            )
        if self.weight_norm:
            similarity = similarity + self.bias
        return torch.cat([x, similarity.to(x.dtype)], 1)

    def _global(self, x: Tensor, include_self: bool, implementation: str | None) -> Tensor:
        """Similarities to the samples of all processes: to this process's own, and to those of the others.

        What is exchanged is M, and in backward its gradient, which is summed over the processes: each process's
        gradient is that of the sum of all processes' losses. Divide by the number of processes where the loss is a
        mean over the whole batch; DistributedDataParallel does it for the parameters.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("MinibatchDiscrimination: global_batch=True needs an initialised torch.distributed")
        group = dist.group.WORLD if self.process_group is None else self.process_group
        rank, processes = dist.get_rank(group), dist.get_world_size(group)
        self._check_equal_batches(x, group, processes)
        m = (x @ self.kernel().flatten(1)).unflatten(1, (self.num_kernels, self.kernel_dim))
        similarity = GF.l1_similarity(m, include_self=include_self, implementation=implementation)
        if processes > 1:
            gathered = _Gather.apply(m, group)
            others = torch.cat([gathered[: rank * len(x)], gathered[(rank + 1) * len(x) :]])
            similarity = similarity + GF.l1_similarity(m, others, implementation=implementation)
        if self.reduction == "sum":
            return similarity
        total = processes * len(x)
        return similarity / max(total if include_self else total - 1, 1)

    @staticmethod
    def _check_equal_batches(x: Tensor, group: dist.ProcessGroup | None, processes: int) -> None:
        size = torch.tensor([len(x)], device=x.device)
        sizes = [torch.empty_like(size) for _ in range(processes)]
        dist.all_gather(sizes, size, group=group)
        sizes = torch.cat(sizes).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(
                f"MinibatchDiscrimination: with global_batch the processes need one batch size, they have {sizes}"
            )

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"MinibatchDiscrimination: x has shape {tuple(x.shape)}; it must be [samples, {self.in_features}]"
            )

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, num_kernels={self.num_kernels}, kernel_dim={self.kernel_dim}"]
        parts += [name for name in ("include_self", "weight_norm", "global_batch") if getattr(self, name)]
        if self.reduction != "sum":
            parts.append(f"reduction={self.reduction!r}")
        return ", ".join(parts)
