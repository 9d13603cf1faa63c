"""A run's generator for programs without gankern: an ONNX or TorchScript file, or its weights in safetensors.

What is exported is the plain-torch form of the network, which is built of torch's layers from the same table and has
the same weights. Before a file is written, it is run beside the run's generator, on another batch size than it was
made with.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gankern.core import extras
from gankern.core.arguments import shown
from gankern.core.files import check_can_write, write_bytes
from gankern.core.names import look_up
from gankern.games import Game
from gankern.models.conditional import CONDITIONINGS
from gankern.training import checkpoint as checkpoints
from gankern.training.checkpoint import Checkpoint, TrainingError

NAMES = ("latents", "labels")  # of the inputs
BATCH, OTHER = 4, 3  # what a file is made with, and what it is tried with
TOLERANCE = 1e-4  # of the largest value: orders of summation differ, results must not
ROUNDING = 1e-6  # of a number near 1, that an image of small values may be what is left of


def export(
    path: Path | str,
    kind: str,
    out: Path | str | None = None,
    layers: str | None = None,
    averaged: bool = True,
) -> tuple[Path, float]:
    """Writes the generator of a run as ``kind``: "onnx", "torchscript" or "safetensors".

    Args:
        path: a run's folder, or one of its checkpoints.
        out: the file; by default generator.onnx, .pt or .safetensors beside the checkpoint.
        layers: which side of a comparison.
        averaged: the moving average of the weights, where there is one.

    The ONNX file has the inputs "latents" and, of a conditional model, "labels" (or vectors), the output "images", and
    any batch size. The safetensors file has the keys of ``load_generator(path, layers="torch")``. Both hold the run's
    configuration: as JSON in the metadata "config".

    Returns the file's path, and the largest difference between what it gives and what the run's generator gives.

    Raises: ImportError where a package is missing; TrainingError where the file does not give what the generator does.
    """
    write, ending = look_up(KINDS, kind, "kind of export")
    saved = checkpoints.load(path)
    side = checkpoints.side_of(saved, layers)
    if layers is not None and layers not in saved.trainers:
        raise ValueError(f"{path} holds {' and '.join(saved.trainers)} layers, layers={layers} was asked for")
    if out is None:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        out = folder / f"generator{ending}"
    elif not isinstance(out, str | PathLike):
        raise TypeError(f"out must be the path of a file, got {shown(out)}")
    check_can_write(out)
    inputs = inputs_of(checkpoints.game(saved, side))
    network = checkpoints.generator(saved, side, "torch", averaged).requires_grad_(False)
    other = tuple(x[:OTHER] for x in inputs)
    content, run = write(network, inputs, _metadata(saved))
    with torch.no_grad():
        # What the run's own layers give, not what the network that was exported does.
        expected = checkpoints.generator(saved, side, averaged=averaged)(*other)
    difference = (run(other) - expected).abs().max().item()
    if not difference <= TOLERANCE * expected.abs().max().item() + ROUNDING:
        raise TrainingError(
            f"the {kind} form of {saved.config.model} gives other results than the run's generator, by up to "
            f"{difference:.1e}: nothing was written"
        )
    write_bytes(out, content)
    return Path(out), difference


def inputs_of(game: Game, number: int = BATCH) -> tuple[Tensor, ...]:
    """What the network that makes a game's pictures is called with, for ``number`` of them."""
    config = game.config
    if game.averaged is None:
        return tuple(x[:number] for x in drawing(game)[1])
    latents = torch.randn(number, config.latent, generator=torch.Generator().manual_seed(0))
    if config.conditioning is None:
        return (latents,)
    if CONDITIONINGS[config.conditioning] != "labels":
        return latents, torch.randn(number, config.num_classes, generator=torch.Generator().manual_seed(1))
    return latents, torch.arange(number) % config.num_classes


def drawing(game: Game) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network that makes a game's pictures, and what it was called with."""
    calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = []

    def note(network: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            calls.append((network, inputs))

    hooks = [network.register_forward_hook(note) for network in game.networks.values()]
    try:
        game.pictures()
    finally:
        for hook in hooks:
            hook.remove()
    if not calls:
        raise ValueError(f"no network of {game.config.model} makes pictures [N, C, H, W]")
    network, inputs = calls[-1]
    return network, tuple(x.clone() for x in inputs)


def _metadata(saved: Checkpoint) -> dict[str, str]:
    return {"format": "pt", "step": str(saved.step), "config": json.dumps(asdict(saved.config))}


# What writes a kind: (network, inputs, metadata) -> (the file's content, the function that the file is).
Written = tuple[bytes, Callable[[tuple[Tensor, ...]], Tensor]]


def _onnx(network: nn.Module, inputs: tuple[Tensor, ...], metadata: dict[str, str]) -> Written:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        extras.load(package, "an ONNX file")
    import onnxruntime

    names = NAMES[: len(inputs)]
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            network,
            inputs,
            dynamo=True,
            input_names=list(names),
            output_names=["images"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    assert program is not None  # which it is where a file is named
    model = program.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(values: tuple[Tensor, ...]) -> Tensor:
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, values)})[0])

    return content, run


def _torchscript(network: nn.Module, inputs: tuple[Tensor, ...], metadata: dict[str, str]) -> Written:
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(network, inputs)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files=dict(metadata))
        buffer.seek(0)
        again: Any = torch.jit.load(buffer)
    return buffer.getvalue(), lambda values: again(*values)


def _safetensors(network: nn.Module, inputs: tuple[Tensor, ...], metadata: dict[str, str]) -> Written:
    safetensors = extras.load("safetensors.torch", "a safetensors file")
    tensors = {name: value.contiguous().clone() for name, value in network.state_dict().items()}
    content = safetensors.save(tensors, metadata)

    def run(values: tuple[Tensor, ...]) -> Tensor:
        network.load_state_dict(safetensors.load(content))
        with torch.no_grad():
            return network(*values)

    return content, run


KINDS = {
    "onnx": (_onnx, ".onnx"),
    "safetensors": (_safetensors, ".safetensors"),
    "torchscript": (_torchscript, ".pt"),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' words about themselves: what they made is tried here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
