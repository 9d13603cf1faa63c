"""Spectral norm of whole discriminators and of one large weight."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gankern.functional as GF
import gankern.nn as gnn
from gankern.measure.cases import Case, Work

NETWORKS: dict[str, list[tuple[int, ...]]] = {
    "SN-DCGAN-64 discriminator": [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)],
    "SNGAN-32 discriminator": [
        *[(128, 3, 3, 3), (128, 128, 3, 3), (128, 3, 1, 1)],  # optimised first block
        *[(128, 128, 3, 3), (128, 128, 3, 3), (128, 128, 1, 1)],  # downsampling block
        *[(128, 128, 3, 3)] * 4,  # two plain blocks
        (1, 128),
    ],
    "1024 x 8192": [(1024, 8192)],
}
VERIFIED: dict[str, list[tuple[int, ...]]] = {
    "convolutions": [(8, 3, 4, 4), (16, 8, 3, 3), (1, 16, 4, 4)],
    "odd matrices": [(1, 1), (1, 257), (33, 1), (67, 1001)],
}


def make(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    """L weights, then L us, then L vs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [normal(*s) / s[0] ** 0.5 for s in shapes]
    us = [F.normalize(normal(s[0]), dim=0) for s in shapes]
    vs = [F.normalize(w.flatten(1).T @ u, dim=0) for w, u in zip(weights, us)]
    tensors = [x.to(dtype).to(device) for x in (*weights, *us, *vs)]
    return [x.requires_grad_(i < len(shapes)) for i, x in enumerate(tensors)]


def grouped(implementation: str | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    n = len(inputs) // 3
    return GF.spectral_norm_group(
        inputs[:n], inputs[n : 2 * n], inputs[2 * n :], eps=1e-12, implementation=implementation
    )


def layer_by_layer(implementation: str | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    n = len(inputs) // 3
    layers = zip(inputs[:n], inputs[n : 2 * n], inputs[2 * n :])
    return [GF.spectral_norm(w, u, v, implementation=implementation) for w, u, v in layers]


def torch_parametrization(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The operations of torch.nn.utils.parametrizations.spectral_norm, without its modules around them."""
    n = len(inputs) // 3
    outputs = []
    for weight, u, v in zip(inputs[:n], inputs[n : 2 * n], inputs[2 * n :]):
        matrix = weight.flatten(1)
        with torch.no_grad():
            F.normalize(torch.mv(matrix, v), dim=0, eps=1e-12, out=u)
            F.normalize(torch.mv(matrix.H, u), dim=0, eps=1e-12, out=v)
        u, v = u.clone(), v.clone()
        outputs.append(weight / torch.vdot(u, torch.mv(matrix, v)))
    return outputs


def work(inputs: Sequence[Tensor]) -> dict[str, Work]:
    """Forward: W for the products and again for the division, and the result. Backward: W and its gradient for their
    inner product, the gradient again, and the result."""
    size = sum(w.numel() for w in inputs[: len(inputs) // 3])
    return {"forward": Work(3 * 4 * size, 3 * size), "backward": Work(4 * 4 * size, 3 * size)}


# ---- as modules: what reading their `.weight` costs ------------------------------------------------------------------


class Weights(nn.Module):
    """Layers, whose weights it returns."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        layers: Any = self.layers
        return [layer.weight for layer in layers]


@functools.lru_cache(maxsize=4)
def network(form: str, *weights: nn.Parameter) -> Weights:
    """Of torch's or gankern's parametrizations over these very weights."""
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = weight
        normalize = parametrizations if form == "torch" else gnn.utils.parametrizations
        layers.append(normalize.spectral_norm(layer))
    root = Weights(layers)
    if form == "grouped":
        gnn.utils.group_spectral_norm(root)
    return root


def make_modules(count: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    weights = make([(2, 2)] * count, dtype, device)[:count]
    return [nn.Parameter(w.detach()) for w in weights]


def through_modules(form: str, implementation: str | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    return network(form, *inputs)()


CASES = [
    Case("spectral_norm", f"11 modules, {form}", functools.partial(make_modules, 11),
         functools.partial(through_modules, form),
         {"torch parametrization": functools.partial(through_modules, "torch", None)}, host=True)
    for form in ("grouped", "layer by layer")
] + [
    Case("spectral_norm", f"{name}, {form}", functools.partial(make, [(2, 2)] * layers), run,
         {"torch parametrization": torch_parametrization}, work, host=True)
    for name, layers, form, run in (("one layer", 1, "layer by layer", layer_by_layer),
                                    ("11 layers", 11, "grouped", grouped),
                                    ("11 layers", 11, "layer by layer", layer_by_layer))
] + [
    Case("spectral_norm", f"{network}, {form}", functools.partial(make, shapes), run,
         {"torch parametrization": torch_parametrization}, work, verify=False,
         quick=form == "grouped" and len(shapes) > 1)
    for network, shapes in NETWORKS.items()
    for form, run in (("grouped", grouped), ("layer by layer", layer_by_layer))
    if len(shapes) > 1 or form == "grouped"
] + [
    Case("spectral_norm", f"{count} layers of 128->128 3x3",
         functools.partial(make, [(128, 128, 3, 3)] * count), grouped,
         {"torch parametrization": torch_parametrization}, work, along=("layers", count))
    for count in (1, 2, 4, 8, 16, 32)
] + [
    Case("spectral_norm", name, functools.partial(make, shapes), grouped, bench=False, quick=True)
    for name, shapes in VERIFIED.items()
]  # fmt: skip
