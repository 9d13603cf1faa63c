"""Models that were not written here: from packages on PyPI, for the tests and for benchmarks/accelerate_step.py.

Each package is installed once, alone, into a folder of its own under the repository's .pytest_cache, without its
dependencies: they would put another torch in the place of the one under test. What is imported is the models' own
modules; packages above them import torchvision, TensorFlow and the like, so empty ones stand in their place.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from filelock import FileLock
from harness import Batch, Case
from torch import Tensor, nn

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d" / "pypi"
VERSIONS = {
    "torch-mimicry": "0.1.16",
    "torchgan": "0.1.0",
    "pytorch-pretrained-biggan": "0.1.1",
    "pro-gan-pth": "3.4",
}


class NotAvailable(Exception):
    """A package cannot be had here; the reason."""


@functools.cache
def _installed(package: str) -> Path | NotAvailable:
    requirement = f"{package}=={VERSIONS[package]}"
    folder = CACHE / requirement.replace("==", "-")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):  # one process of pytest-xdist installs, the others wait for it
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(dir=CACHE) as beside:
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", beside]
            command += ["--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "30", requirement]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            except subprocess.TimeoutExpired:
                return NotAvailable(f"installing {requirement} from PyPI took too long")
            if done.returncode:
                return NotAvailable(f"{requirement} cannot be installed from PyPI: {done.stderr.strip()[-200:]}")
            os.chmod(beside, 0o755)
            os.rename(beside, folder)
            os.mkdir(beside)  # for TemporaryDirectory to remove
    return folder


def _empty_package(name: str, folder: Path) -> types.ModuleType:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return package


@functools.cache
def _packages(package: str, *emptied: str) -> None:
    folder = _installed(package)
    if isinstance(folder, NotAvailable):
        raise folder
    # torchgan installs its tests as a package of that name, which processes that tests start would take for ours.
    shutil.rmtree(folder / "tests", ignore_errors=True)
    sys.path.append(str(folder))
    for name in emptied:
        _empty_package(name, folder / name.replace(".", "/"))


def mimicry(module: str) -> types.ModuleType:
    """A module of torch_mimicry.nets."""
    _packages("torch-mimicry", "torch_mimicry", "torch_mimicry.nets")
    return importlib.import_module(f"torch_mimicry.nets.{module}")


def torchgan(module: str) -> types.ModuleType:
    _packages("torchgan", "torchgan")
    return importlib.import_module(f"torchgan.{module}")


def biggan(module: str) -> types.ModuleType:
    _packages("pytorch-pretrained-biggan", "pytorch_pretrained_biggan")
    downloads = types.ModuleType("pytorch_pretrained_biggan.file_utils")  # for downloads; wants boto3 and requests
    downloads.cached_path = None
    sys.modules.setdefault(downloads.__name__, downloads)
    return importlib.import_module(f"pytorch_pretrained_biggan.{module}")


def progan(module: str) -> types.ModuleType:
    _packages("pro-gan-pth")
    return importlib.import_module(f"pro_gan_pytorch.{module}")


# ---- the models -----------------------------------------------------------------------------------------------


def images(count: int = 4, size: int = 32) -> Callable[[], Batch]:
    return lambda: (torch.randn(count, 3, size, size),)


def against(fake: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss that mimicry's train_step takes: its own function of the logits of real and fake images."""

    def loss(discriminator: nn.Module, batch: Batch) -> Tensor:
        x, *rest = batch
        return discriminator.compute_gan_loss(
            output_real=discriminator(x, *rest), output_fake=discriminator(fake(x.detach()), *rest)
        )

    return loss


def _fake(x: Tensor) -> Tensor:
    return torch.tanh(x.flip(0).roll(3, -1) * 1.5)


def _mimicry_penalty(discriminator: nn.Module, batch: Batch) -> Tensor:
    # Its own, as handwritten as they come. It draws in the default dtype.
    (x,) = batch
    return discriminator.compute_gradient_penalty_loss(x, _fake(x))


def _mimicry(
    name: str, part: str, count: int, *shape: int, **options: Any
) -> tuple[str, Callable[[], nn.Module], Callable[[], Batch]]:
    """A network of mimicry's: its name, how it is built, and a batch of inputs of ``shape``."""
    cls = {"sngan": "SNGAN", "wgan_gp": "WGANGP", "dcgan": "DCGAN", "sagan": "SAGAN"}[name]
    labels = name == "sagan"
    if labels:
        options["num_classes"] = 5

    def build() -> nn.Module:
        return getattr(mimicry(f"{name}.{name}_32"), f"{cls}{part}32")(**options)

    def batch() -> Batch:
        x = torch.randn(count, *shape)
        return (x, torch.randint(5, (count,))) if labels else (x,)

    return f"mimicry {name}_32 {part.lower()}", build, batch


def _mimicry_discriminator(name: str, width: int, count: int, **options: Any) -> Case:
    return Case(
        *_mimicry(name, "Discriminator", count, 3, 32, 32, ndf=width, **options),
        against(_fake),
        _mimicry_penalty if name == "wgan_gp" else None,
        # compute_gan_loss makes labels of float32 for the sigmoid losses
        doubles=name != "dcgan",
    )


def _mimicry_generator(name: str, width: int, count: int, **options: Any) -> Case:
    return Case(*_mimicry(name, "Generator", count, 16, nz=16, ngf=width, **options))


def _torchgan_discriminator(width: int, count: int, size: int = 32) -> Case:
    def loss(discriminator: nn.Module, batch: Batch) -> Tensor:
        functional = torchgan("losses.functional")
        (x,) = batch
        return functional.minimax_discriminator_loss(discriminator(x), discriminator(_fake(x.detach())))

    def penalty(discriminator: nn.Module, batch: Batch) -> Tensor:
        functional = torchgan("losses.functional")
        (x,) = batch
        between = torch.lerp(x.detach(), _fake(x.detach()), 0.3).requires_grad_()
        return 10 * functional.wasserstein_gradient_penalty(between, discriminator(between))

    def build() -> nn.Module:
        return torchgan("models.dcgan").DCGANDiscriminator(size, step_channels=width)

    return Case("torchgan DCGAN discriminator", build, images(count, size), loss, penalty)


def _torchgan_generator(width: int, count: int) -> Case:
    def build() -> nn.Module:
        return torchgan("models.dcgan").DCGANGenerator(16, 32, step_channels=width)

    return Case("torchgan DCGAN generator", build, lambda: (torch.randn(count, 16),))


class Stack(nn.Module):
    """Layers one after the other, as somebody puts torchgan's layers into a model of his own. (Not an nn.Sequential of
    everything: the activation comes from a function.)"""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if isinstance(layer, nn.Flatten) or i == len(self.layers) - 1:
                continue
            x = F.leaky_relu(x, 0.2)
        return x


def _torchgan_spectral(width: int, count: int) -> Case:
    def build() -> nn.Module:
        norm = torchgan("layers").SpectralNorm2d
        return Stack(
            norm(nn.Conv2d(3, width, 4, 2, 1)),
            norm(nn.Conv2d(width, 2 * width, 4, 2, 1), power_iterations=2),
            norm(nn.Conv2d(2 * width, 2 * width, 3, 1, 1)),
            nn.Flatten(),
            norm(nn.Linear(2 * width * 64, 1)),
        )

    return Case("torchgan spectral norm", build, images(count), _hinge)


def _torchgan_minibatch(width: int, count: int) -> Case:
    def build() -> nn.Module:
        similarity = torchgan("layers").MinibatchDiscrimination1d(width * 16, 8)
        # From N(0, 1), where it starts, nothing is similar: what is left of exp(-distance) is rounding.
        nn.init.normal_(similarity.T, 0, 0.05)
        return Stack(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.Conv2d(width, width, 4, 4),
            nn.Flatten(),
            similarity,
            nn.Linear(width * 16 + 8, 1),
        )

    return Case("torchgan minibatch discrimination", build, images(count), _hinge, _penalty)


def _torchgan_virtual(width: int, count: int) -> Case:
    def build() -> nn.Module:
        layers = torchgan("layers")
        return Stack(
            nn.Conv2d(3, width, 4, 2, 1),
            layers.VirtualBatchNorm(width),
            nn.Conv2d(width, width, 3, 1, 1),
            layers.VirtualBatchNorm(width),
            nn.Flatten(),
            nn.Linear(width * 256, 1),
        )

    return Case("torchgan virtual batch norm", build, images(count), _hinge)


def _torchgan_attention(width: int, count: int) -> Case:
    def build() -> nn.Module:
        layers = torchgan("layers")
        attention = layers.SelfAttention2d(width)
        nn.init.constant_(attention.gamma, 0.5)
        return Stack(
            nn.Conv2d(3, width, 4, 2, 1),
            attention,
            nn.Conv2d(width, width, 3, 1, 1),
            nn.Flatten(),
            nn.Linear(width * 256, 1),
        )

    return Case("torchgan self-attention", build, images(count), _hinge, _penalty)


def _hinge(discriminator: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    return F.relu(1 - discriminator(x)).mean() + F.relu(1 + discriminator(_fake(x.detach()))).mean()


def _penalty(discriminator: nn.Module, batch: Batch) -> Tensor:
    x = torch.lerp(batch[0].detach(), _fake(batch[0].detach()), 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return 10 * (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()


def _biggan_generator(width: int, count: int) -> Case:
    def build() -> nn.Module:
        config = biggan("config").BigGANConfig(
            output_dim=32,
            z_dim=16,
            class_embed_dim=16,
            channel_width=width,
            num_classes=10,
            layers=[(False, 16, 16), (True, 16, 8), (True, 8, 4), (False, 4, 2), (True, 2, 1)],
            attention_layer_position=3,
        )
        model = biggan("model").BigGAN(config)
        nn.init.normal_(model.generator.bn.weight, 1, 0.1)  # it leaves these two uninitialised
        nn.init.zeros_(model.generator.bn.bias)
        for module in model.modules():
            if hasattr(module, "gamma"):
                nn.init.constant_(module.gamma, 0.5)
        return model

    def batch() -> Batch:
        return torch.randn(count, 16), F.one_hot(torch.randint(10, (count,)), 10).float(), 0.4

    return Case("pytorch-pretrained-biggan generator", build, batch)


def _progan_discriminator(depth: int, count: int, width: int) -> Case:
    size = 2**depth

    def loss(discriminator: nn.Module, batch: Batch) -> Tensor:
        x, *rest = batch
        real, fake = discriminator(x, *rest), discriminator(_fake(x.detach()), *rest)
        return fake.mean() - real.mean() + 0.001 * real.square().mean()

    def penalty(discriminator: nn.Module, batch: Batch) -> Tensor:
        x, *rest = batch
        return progan("losses").WganGP._gradient_penalty(discriminator, x, _fake(x), *rest)

    def build() -> nn.Module:
        networks = progan("networks")
        with mock.patch.object(networks, "nf", lambda stage: width):  # which is 512 up to stage 5
            return networks.Discriminator(depth=depth, latent_size=width)

    def batch() -> Batch:
        return torch.randn(count, 3, size, size), depth, 0.7

    return Case("pro-gan-pth discriminator", build, batch, loss, penalty)


def cases(width: int = 16, count: int = 4, progan_depth: int = 4, progan_width: int = 512) -> dict[str, Case]:
    """All models; by default as small as they still have every layer."""
    attention_width = max(width, 16)
    made = [
        _mimicry_discriminator("sngan", width, count),
        _mimicry_discriminator("wgan_gp", width, count),
        _mimicry_discriminator("dcgan", width, count),
        _mimicry_discriminator("sagan", attention_width, count),
        _mimicry_generator("sngan", width, count),
        _mimicry_generator("wgan_gp", width, count),
        _mimicry_generator("dcgan", width, count),
        _mimicry_generator("sagan", attention_width, count),
        _torchgan_discriminator(width, count),
        _torchgan_generator(width, count),
        _torchgan_spectral(width, count),
        _torchgan_minibatch(width, count),
        _torchgan_virtual(width, count),
        _torchgan_attention(width, count),
        _biggan_generator(max(width // 2, 4), count),
        _progan_discriminator(progan_depth, count, progan_width),
    ]
    return {case.name: case for case in made}
