"""A whole training step as one CUDA graph: the host launches it, instead of some thousand kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gankern.core import devices

WARM_UP = 3  # steps before the capture, in which libraries choose algorithms and optimisers make their state


class NotCaptured(RuntimeError):
    """A step cannot be captured; everything is as it was before."""


class GraphedStep:
    """Captures a training step once, and replays it for each call.

    ``step(*inputs)`` is any function of CUDA tensors that trains: forward passes, a penalty, backward passes, and the
    optimisers' ``zero_grad()`` and ``step()``, of one player or of both. What it returns (losses, say) is returned by
    each call, in buffers that the next call overwrites. A call copies its inputs into the buffers that were captured.

    The warm-up trains on the examples; weights, buffers, gradients, the optimisers' state and torch's random generators
    are put back afterwards, so that the first call is the first step. An optimiser's state that did not exist starts
    from zeros, as Adam's and RMSprop's do. Each replay draws new random numbers.

    Small batches gain most: their kernels are shorter than the launch of one from Python.

    Args:
        step: the function. It must not wait for the device (``.item()``, ``.cpu()``, a tensor as a condition) and must
            do the same work each time, or the same for each value of ``depends_on``.
        inputs: examples of its inputs, CUDA tensors; later ones have their shapes, dtypes and devices.
        networks: all networks that the step changes, in parameters or in buffers.
        optimisers: all optimisers that it calls; a list may change between captures. Their step must be capturable:
            ``Adam(..., capturable=True)``. A learning rate that is to change is a tensor on the device,
            ``lr=torch.tensor(1e-4, device="cuda")``, changed in place: a number becomes part of the graph.
        scalers: all ``torch.amp.GradScaler`` that it calls, with optimisers that are told of the scale instead of
            asking for it (fused Adam); others wait for the device.
        depends_on: what the step's work depends on beside the values of tensors, as something that can be a key: the
            resolution and the fading of networks that grow, whether it is a step with a penalty. The step runs as it is
            where a value is new, is captured when the value comes again, and replayed from then on: a graph a value.
            Inputs may then have other shapes for each value. What changes every time is never captured.

    Accumulation of gradients is a loop within the step.

    Raises:
        ValueError: an argument does not fit; the message names it.
        NotCaptured: the step cannot be captured; everything is as it was before. A RuntimeError.

    >>> def train(real, latents):                                                               # doctest: +SKIP
    ...     d_optimiser.zero_grad()
    ...     with torch.no_grad():
    ...         fake = generator(latents)
    ...     critic_step(critic, real, fake).loss.backward()
    ...     d_optimiser.step()
    >>> step = GraphedStep(train, (real, latents), (generator, critic), (d_optimiser,))         # doctest: +SKIP
    >>> for real in batches:                                                                    # doctest: +SKIP
    ...     step(real, torch.randn_like(latents))
    """

    def __init__(
        self,
        step: Callable[..., Any],
        inputs: Sequence[Tensor],
        networks: Sequence[nn.Module],
        optimisers: Sequence[torch.optim.Optimizer],
        *,
        scalers: Sequence[torch.amp.GradScaler] = (),
        depends_on: Callable[[], Hashable] | None = None,
    ):
        _check(inputs, networks, optimisers)
        self.step, self.networks, self.optimisers, self.scalers = step, networks, optimisers, scalers
        self.depends_on = depends_on
        self.captured: dict[Hashable, Captured | None] = {}  # by what the step depends on; None: seen once
        if depends_on is None:
            self.captured[None] = self._capture(inputs)

    def _capture(self, inputs: Sequence[Tensor]) -> Captured:
        _check(inputs, self.networks, self.optimisers)
        own = tuple(x.detach().clone(memory_format=torch.preserve_format) for x in inputs)
        device = own[0].device
        state = _State(self.networks, self.optimisers, self.scalers, device)
        graph = torch.cuda.CUDAGraph()
        try:
            _let_go_of_graphs(self.networks)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with devices.to_be_replayed(), torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.step(*own)
                # Gradients that the captured step makes then lie in the graph's own memory.
                state.forget_gradients()
            torch.cuda.current_stream(device).wait_stream(stream)
            # On that stream, to which parameters' nodes in autograd's graph belong now.
            with devices.to_be_replayed(), torch.cuda.graph(graph, stream=stream):
                outputs = self.step(*own)
        except RuntimeError as error:
            state.restore()
            state.restore_gradients()
            raise NotCaptured(
                f"step cannot be captured: {error}\nA captured step must not wait for the device (.item(), .cpu(), a "
                "tensor as a condition), must not depend on values in shapes, and its networks must not grow or be "
                "compiled within it."
            ) from error
        state.restore()
        return Captured(own, graph, outputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Trains on ``inputs`` and returns what the step returns; the next call overwrites it."""
        key = None if self.depends_on is None else self.depends_on()
        if key not in self.captured:
            self.captured[key] = None
            return tree_map_only(Tensor, Tensor.detach, self.step(*inputs))
        captured = self.captured[key]
        if captured is None:
            captured = self.captured[key] = self._capture(inputs)
        captured.take(inputs)
        captured.graph.replay()
        return tree_map_only(Tensor, Tensor.detach, captured.outputs)


class Captured(NamedTuple):
    """One graph, and where it reads its inputs and leaves what the step returned."""

    inputs: tuple[Tensor, ...]
    graph: Any
    outputs: Any

    def take(self, inputs: Sequence[Tensor]) -> None:
        """Copies the inputs to where the graph reads them."""
        if len(inputs) != len(self.inputs):
            raise ValueError(f"inputs: the step was captured with {len(self.inputs)} tensors, got {len(inputs)}")
        for i, (own, given) in enumerate(zip(self.inputs, inputs)):
            if (own.shape, own.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"inputs[{i}]: the step was captured with {_described(own)}, got {_described(given)}; a step of "
                    "another shape needs a GraphedStep of its own, or depends_on"
                )
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"


def _check(
    inputs: Sequence[Tensor], networks: Sequence[nn.Module], optimisers: Sequence[torch.optim.Optimizer]
) -> None:
    tensors = {f"inputs[{i}]": x for i, x in enumerate(inputs)}
    if not tensors:
        raise ValueError("inputs: at least one CUDA tensor is needed, got none")
    for i, network in enumerate(networks):
        tensors |= {f"networks[{i}].{name}": x for name, x in [*network.named_parameters(), *network.named_buffers()]}
    devices = {name: x.device for name, x in tensors.items()}
    device = devices["inputs[0]"]
    for name, own in devices.items():
        if own.type != "cuda":
            raise ValueError(f"{name}: CUDA graphs need a CUDA tensor, got one on {own}")
        if own != device:
            raise ValueError(f"{name}: all tensors must be on one device, got {own} beside {device}")
    for i, optimiser in enumerate(optimisers):
        # Where an optimiser has the option, its step waits for the device without it.
        if any(group.get("capturable") is False for group in optimiser.param_groups):
            name = type(optimiser).__name__
            raise ValueError(
                f"optimisers[{i}]: this {name}'s step cannot be captured; make it with {name}(..., capturable=True)"
            )


def _let_go_of_graphs(networks: Sequence[nn.Module]) -> None:
    """What modules keep of an earlier call, as torch's hook of a spectral norm keeps the weight that it made, without
    autograd's graph of it: with that, parameters' nodes stay those of the stream of that call, the default one mostly,
    and a backward within a capture would have it wait, which the driver refuses."""
    for network in networks:
        for module in network.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    vars(module)[name] = value.detach()


class _State:
    """All that a step changes, as it was when this was made."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimisers: Sequence[torch.optim.Optimizer],
        scalers: Sequence[torch.amp.GradScaler],
        device: torch.device,
    ):
        self.optimisers, self.device = list(optimisers), device
        owners = [x for network in networks for x in (*network.parameters(), *network.buffers())]
        owners += [x for optimiser in optimisers for x in self._tensors_of(optimiser)]
        self.values = [(x, x.detach().clone()) for x in owners]
        self.known = {id(x) for x in owners}
        parameters = [x for network in networks for x in network.parameters()]
        self.gradients = [(x, x.grad) for x in parameters]
        self.gradient_values = [(x.grad, x.grad.clone()) for x in parameters if x.grad is not None]
        self.scalers = [(scaler, scaler.state_dict()) for scaler in scalers]
        self.random = torch.cuda.get_rng_state(device)
        self.random_of_host = torch.get_rng_state()

    @staticmethod
    def _tensors_of(optimiser: torch.optim.Optimizer) -> list[Tensor]:
        return [x for x in tree_leaves(list(optimiser.state.values())) if isinstance(x, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        """The values, in place: a captured graph goes on reading where it read."""
        for x, value in self.values:
            x.copy_(value)
        for optimiser in self.optimisers:
            for x in self._tensors_of(optimiser):
                if id(x) not in self.known:
                    x.zero_()
        for scaler, before in self.scalers:
            # In place, too: what load_state_dict puts there is another tensor, or none yet.
            scale, tracker = scaler._scale, scaler._growth_tracker
            if scale is not None and tracker is not None:
                scale.fill_(before["scale"])
                tracker.fill_(before["_growth_tracker"])
        torch.cuda.set_rng_state(self.random, self.device)
        torch.set_rng_state(self.random_of_host)

    def forget_gradients(self) -> None:
        for x, _ in self.gradients:
            x.grad = None

    @torch.no_grad()
    def restore_gradients(self) -> None:
        for gradient, value in self.gradient_values:
            gradient.copy_(value)
        for parameter, before in self.gradients:
            parameter.grad = before
