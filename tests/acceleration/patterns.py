"""Small models after ways in which GANs are commonly written, one a pattern; docs/accelerate_patterns.md names them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Batch, Case
from torch import Tensor, nn


def images(count: int = 4, channels: int = 3, size: int = 16, channels_last: bool = False):
    def batch() -> Batch:
        x = torch.randn(count, channels, size, size)
        return (x.to(memory_format=torch.channels_last) if channels_last else x,)

    return batch


def scores(discriminator: nn.Module, x: Tensor) -> Tensor:
    y = discriminator(x)
    return y["score"] if isinstance(y, dict) else y


def hinge(discriminator: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    fake = torch.tanh(1.5 * x.detach().flip(0))
    return F.relu(1 - scores(discriminator, x)).mean() + F.relu(1 + scores(discriminator, fake)).mean()


def penalty(discriminator: nn.Module, batch: Batch) -> Tensor:
    """As it stands in hundreds of repositories."""
    real = batch[0].detach()
    fake = torch.tanh(1.5 * real.flip(0))
    alpha = torch.rand(real.size(0), 1, 1, 1, dtype=real.dtype)
    interpolates = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
    d_interpolates = scores(discriminator, interpolates)
    gradients = torch.autograd.grad(
        outputs=d_interpolates,
        inputs=interpolates,
        grad_outputs=torch.ones_like(d_interpolates),
        create_graph=True,
        retain_graph=True,
        only_inputs=True,
    )[0]
    gradients = gradients.view(gradients.size(0), -1)
    return 10 * ((gradients.norm(2, dim=1) - 1) ** 2).mean()


def flat_penalty(discriminator: nn.Module, batch: Batch) -> Tensor:
    """For models in channels_last, whose gradients cannot be viewed as rows."""
    x = (0.7 * batch[0].detach() + 0.3 * torch.tanh(1.5 * batch[0].detach().flip(0))).requires_grad_()
    (gradient,) = torch.autograd.grad(scores(discriminator, x).sum(), x, create_graph=True)
    return 10 * (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()


class Critic(nn.Module):
    """The plain critic of WGAN-GP tutorials: strided convolutions and leaky ReLUs in a Sequential."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            nn.AvgPool2d(2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).flatten()


class InPlaceHead(nn.Module):
    """A residual branch that begins with an in-place ReLU: the shortcut adds the *activated* input."""

    def __init__(self, width: int, norm=nn.Identity, down: bool = False) -> None:
        super().__init__()
        self.down = down
        self.branch = nn.Sequential(
            norm(width) if norm is nn.BatchNorm2d else nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.branch(x) if self.down else self.branch(x) + x
        return F.avg_pool2d(y, 2) if self.down else y


class InPlaceResidual(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.blocks = nn.Sequential(InPlaceHead(width, down=True), InPlaceHead(width), InPlaceHead(width))
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)).sum((2, 3)))


class OneActivation(nn.Module):
    """One activation object that all blocks share."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.2)
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.blocks = nn.ModuleList(
            [nn.Sequential(self.act, nn.Conv2d(width, width, 3, 1, 1), self.act, nn.Conv2d(width, width, 3, 1, 1))
             for _ in range(3)]
        )  # fmt: skip
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = F.avg_pool2d(x + block(x), 2)
        return self.last(self.act(x).mean((2, 3)))


class FunctionalUpsampling(nn.Module):
    """A residual generator that upsamples by function, before the convolution of the branch and of the shortcut."""

    class Block(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(a), nn.BatchNorm2d(b)
            self.conv1, self.conv2 = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
            self.shortcut = nn.Conv2d(a, b, 1)

        def forward(self, x: Tensor) -> Tensor:
            up = F.interpolate(F.relu(self.bn1(x)), scale_factor=2)
            y = self.conv2(F.relu(self.bn2(self.conv1(up))))
            return y + self.shortcut(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 4 * width * 16)
        self.blocks = nn.Sequential(self.Block(4 * width, 2 * width), self.Block(2 * width, width))
        self.tail = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.tail(self.blocks(self.dense(z).view(len(z), -1, 4, 4)))


class ModuleUpsampling(nn.Module):
    """DCGAN's generator with resize-convolutions in a Sequential."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ConvTranspose2d(8, 4 * width, 4), nn.BatchNorm2d(4 * width), nn.ReLU(True)]
        for a, b in ((4 * width, 2 * width), (2 * width, width)):
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(a, b, 3, 1, 1),
                nn.BatchNorm2d(b, 0.8),
                nn.LeakyReLU(0.2, True),
            ]
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z[:, :, None, None])


class FunctionalActivations(nn.Module):
    """Activations and poolings in forward, as functions; some of them in place."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.c3, self.c4 = nn.Conv2d(2 * width, 2 * width, 4, 2, 1), nn.Conv2d(2 * width, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.c1(x), 0.2)
        x = F.avg_pool2d(F.leaky_relu(self.c2(x), 0.2, inplace=True), 2)
        x = F.leaky_relu_(self.c3(x), negative_slope=0.1)
        return self.c4(x).squeeze()


class ReturnsDict(nn.Module):
    """A discriminator that returns a dict: the scores and the features for a feature-matching loss."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)])
        self.head = nn.utils.spectral_norm(nn.Conv2d(width, 1, 4))

    def forward(self, x: Tensor) -> dict[str, object]:
        features = []
        for layer in self.layers:
            x = F.avg_pool2d(layer(x), 2)
            features.append(x)
            x = F.relu(x)
        return {"features": features, "score": self.head(x)[:, 0, 0, 0]}


def feature_matching(discriminator: nn.Module, batch: Batch) -> Tensor:
    (x,) = batch
    features = zip(discriminator(x)["features"], discriminator(x.detach().flip(0) * 0.7)["features"])
    return hinge(discriminator, batch) + sum((a.mean(0) - b.mean(0)).abs().mean() for a, b in features)


class Views(nn.Module):
    """.view after convolutions: it needs the memory format that torch's convolution returns."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1)
        self.up = nn.Conv2d(width, width, 3, 1, 1)
        self.project = nn.Conv2d(width, width, 4, 2, 1)
        self.last = nn.Linear(width * 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        y = self.conv(x).view(n, -1, 4, 4, 4, 4).sum((3, 5))
        z = F.avg_pool2d(self.up(F.interpolate(y, scale_factor=2)), 2).view(n, -1)
        h = self.project(F.relu(F.interpolate(y, size=(16, 16)))).view(n, -1)
        return self.last(h) + z.mean(1, keepdim=True)


class Tied(nn.Module):
    """Weights tied between two layers, one of them applied twice as well; and the transposed layer of an autoencoder
    with the encoder's weight."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 4, 2, 1)
        self.a = nn.Conv2d(width, width, 3, 1, 1)
        self.b = nn.Conv2d(width, width, 3, 1, 1)
        self.b.weight = self.a.weight
        self.back = nn.ConvTranspose2d(width, 3, 4, 2, 1)
        self.back.weight = self.first.weight
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x), 0.2)
        h = F.relu(self.a(F.relu(self.b(F.relu(self.a(h))))))
        again = F.relu(self.first(self.back(h)))
        return self.last((h + again).sum((2, 3)))


def twice(spectral_norm):
    class Twice(nn.Module):
        """A spectrally normalised layer that runs twice in a forward (each run iterates), and one that a flag skips."""

        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.first = spectral_norm(nn.Conv2d(3, width, 4, 2, 1))
            self.shared = spectral_norm(nn.Conv2d(width, width, 3, 1, 1))
            self.last = spectral_norm(nn.Linear(width, 1))

        def forward(self, x: Tensor) -> Tensor:
            h = F.leaky_relu(self.first(x), 0.1)
            h = F.leaky_relu(self.shared(h), 0.1)
            h = F.leaky_relu(self.shared(h), 0.1)
            return self.last(h.sum((2, 3)))

    return Twice


class CopiedWrapper(nn.Module):
    """The spectral norm wrapper that many repositories copied from each other: weight_bar, weight_u, weight_v are
    parameters, and evaluation iterates too."""

    def __init__(self, module: nn.Module, name: str = "weight", power_iterations: int = 1) -> None:
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        w = getattr(module, name)
        flat = w.data.reshape(w.shape[0], -1)
        del module._parameters[name]
        for suffix, size in (("u", flat.shape[0]), ("v", flat.shape[1])):
            vector = nn.Parameter(self.unit(w.data.new(size).normal_(0, 1)), requires_grad=False)
            module.register_parameter(f"{name}_{suffix}", vector)
        module.register_parameter(f"{name}_bar", nn.Parameter(w.data))

    @staticmethod
    def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
        return x / (x.norm() + eps)

    def _update_u_v(self) -> None:
        u, v, w = (getattr(self.module, f"{self.name}_{suffix}") for suffix in ("u", "v", "bar"))
        flat = w.reshape(w.shape[0], -1)
        for _ in range(self.power_iterations):
            v.data = self.unit(torch.mv(flat.data.t(), u.data))
            u.data = self.unit(torch.mv(flat.data, v.data))
        sigma = u.dot(flat.mv(v))
        setattr(self.module, self.name, w / sigma.expand_as(w))

    def forward(self, *args: Tensor) -> Tensor:
        self._update_u_v()
        return self.module.forward(*args)


class Wrapped(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            CopiedWrapper(nn.Conv2d(3, width, 4, 2, 1)),
            nn.LeakyReLU(0.1),
            CopiedWrapper(nn.Conv2d(width, 2 * width, 3, 1, 1), power_iterations=2),
            nn.LeakyReLU(0.1),
        )
        self.fc = CopiedWrapper(nn.Linear(2 * width * 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).view(len(x), -1))


class Iterating:
    """BigGAN's way: layers that are subclasses and iterate by themselves, with u0 and sv0 as buffers."""

    def _start(self, outputs: int, eps: float = 1e-12) -> None:
        self.eps, self.num_svs, self.num_itrs = eps, 1, 1
        self.register_buffer("u0", torch.randn(1, outputs))
        self.register_buffer("sv0", torch.ones(1))

    @property
    def u(self) -> list[Tensor]:
        return [self.u0]

    @property
    def sv(self) -> list[Tensor]:
        return [self.sv0]

    def W_(self) -> Tensor:
        w = self.weight.view(self.weight.size(0), -1)
        for _ in range(self.num_itrs):
            with torch.no_grad():
                v = F.normalize(torch.matmul(self.u0, w), eps=self.eps)
                u = F.normalize(torch.matmul(v, w.t()), eps=self.eps)
                if self.training:
                    self.u0[:] = u
            sigma = torch.squeeze(torch.matmul(torch.matmul(v, w.t()), u.t()))
        if self.training:
            with torch.no_grad():
                self.sv0[:] = sigma
        return self.weight / sigma


class IteratingConv2d(nn.Conv2d, Iterating):
    def __init__(self, *args, **kwargs) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._start(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class IteratingLinear(nn.Linear, Iterating):
    def __init__(self, *args, **kwargs) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._start(self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_(), self.bias)


class IteratingEmbedding(nn.Embedding, Iterating):
    def __init__(self, *args, **kwargs) -> None:
        nn.Embedding.__init__(self, *args, **kwargs)
        self._start(self.num_embeddings)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.W_())


class SelfIterating(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = IteratingConv2d(3, width, 3, padding=1), IteratingConv2d(width, width, 3, padding=1)
        self.shortcut = IteratingConv2d(3, width, 1)
        self.linear, self.embed = IteratingLinear(width, 1), IteratingEmbedding(5, width)
        self.activation, self.downsample = nn.ReLU(inplace=False), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.downsample(self.conv2(self.activation(self.conv1(x))))
        h = self.activation(h + self.shortcut(self.downsample(x))).sum((2, 3))
        labels = torch.arange(len(x)) % 5
        return self.linear(h) + (self.embed(labels) * h).sum(1, keepdim=True)


def hooked(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


def parametrized(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(layer)


TwiceHooked, TwiceParametrized, TwiceWrapped = twice(hooked), twice(parametrized), twice(CopiedWrapper)
for _cls, _name in (
    (TwiceHooked, "TwiceHooked"),
    (TwiceParametrized, "TwiceParametrized"),
    (TwiceWrapped, "TwiceWrapped"),
):
    _cls.__name__ = _cls.__qualname__ = _name  # to be pickled


class ChannelsLast(nn.Module):
    """A model that is kept in channels_last, with its own conversion of the input."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = InPlaceResidual(width).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.contiguous(memory_format=torch.channels_last))


class BatchNormInside(nn.Module):
    """Batch norm between a convolution and an in-place activation, before a mean: DCGAN's discriminator."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).view(-1, 1).squeeze(1)


def latents(count: int = 4):
    return lambda: (torch.randn(count, 8),)


CASES = {
    case.name: case
    for case in (
        Case("handwritten gradient penalty", Critic, images(), hinge, penalty),
        Case("in-place ReLU at the head of a residual branch", InPlaceResidual, images(), hinge, penalty),
        Case("one activation object shared by all blocks", OneActivation, images(), hinge, penalty),
        Case("functional upsampling", FunctionalUpsampling, latents()),
        Case("upsampling modules in a Sequential", ModuleUpsampling, latents()),
        Case("functional activations", FunctionalActivations, images(), hinge, penalty),
        Case("channels_last model", ChannelsLast, images(), hinge, flat_penalty),
        Case("discriminator that returns a dict", ReturnsDict, images(), feature_matching, penalty),
        Case("view after a convolution", Views, images(), hinge, penalty),
        Case("weights tied between layers", Tied, images(), hinge, penalty),
        Case("spectrally normalised layer used twice, hook", TwiceHooked, images(), hinge, penalty),
        Case("spectrally normalised layer used twice, parametrization", TwiceParametrized, images(), hinge, penalty,
             pickles=False),
        Case("spectrally normalised layer used twice, copied wrapper", TwiceWrapped, images(), hinge, penalty),
        Case("copied SpectralNorm wrapper", Wrapped, images(), hinge, penalty),
        Case("self-iterating layers", SelfIterating, images(), hinge, penalty),
        Case("batch norm and in-place activation", BatchNormInside, images(), hinge, penalty),
    )
}  # fmt: skip
