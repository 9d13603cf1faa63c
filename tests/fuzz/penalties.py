"""Penalties and critic_step of critics that are drawn, against double backward written out by hand in double precision:
values, each parameter's gradient, which of them are None, buffers, and the modes and flags that must be left alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from drawing import Draw, Problem, difference, size
from torch import Tensor, nn

import gankern
import gankern.nn as gnn
import gankern.penalties as gp


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Both(nn.Module):
    """Two branches, joined."""

    def __init__(self, one: nn.Module, other: nn.Module, join: Any) -> None:
        super().__init__()
        self.one, self.other, self.join = one, other, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.one(x), self.other(x))


class Attention(nn.Module):
    """Self-attention over the last dimension but one of [N, L, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Blurred(nn.Module):
    """A part that torch does not see."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean() + 1
        return x / scale


def _frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def _in_place(x: Tensor) -> Tensor:
    y = x * 1.5
    y[:, 0] += 1
    y.mul_(y.tanh())
    return y


def _spectrum(x: Tensor) -> Tensor:
    y = torch.fft.rfft(x, dim=-1)
    return torch.cat([y.real, y.imag], -1)[..., : x.shape[-1]] + 0.5 * x


# Of [N, C, H, W] to the same shape.
def _image_layer(draw: Draw, c: int) -> nn.Module:
    return draw.choice(
        (
            lambda: nn.Conv2d(c, c, 3, padding=1, bias=draw.random() < 0.7),
            lambda: gnn.Conv2d(c, c, 3, padding=1, bias=draw.random() < 0.7),
            lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(c, c, 3, padding=1)),
            lambda: gnn.utils.parametrizations.spectral_norm(gnn.Conv2d(c, c, 3, padding=1)),
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(c, c, 1)),
            lambda: gnn.EqualizedConv2d(c, c, 3, padding=1),
            lambda: nn.Sequential(gnn.UpsampleConv2d(c, c, 3), nn.AvgPool2d(2)),
            lambda: nn.Sequential(nn.Upsample(scale_factor=2), gnn.ConvDownsample2d(c, c, 3)),
            lambda: nn.Sequential(gnn.Conv2d(c, c, 4, 2, 1), gnn.ConvTranspose2d(c, c, 4, 2, 1)),
            lambda: nn.Conv2d(c, c, 3, padding=1, padding_mode=draw.choice(("reflect", "circular", "replicate"))),
            lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c),
            lambda: _frozen(nn.Conv2d(c, c, 3, padding=1)),
            lambda: nn.GroupNorm(draw.choice((1, c)), c),
            lambda: nn.InstanceNorm2d(c, affine=draw.random() < 0.5),
            lambda: nn.BatchNorm2d(c),
            lambda: gnn.BatchNormAct2d(c, activation=draw.choice((None, "relu", "leaky_relu"))),
            lambda: gnn.PixelNorm(),
            lambda: gnn.BiasActPixelNorm(c),
            lambda: gnn.BiasAct(c, draw.choice(("leaky_relu", "silu", "tanh", "softplus", "elu")), clamp=draw.maybe(1.5)),
            lambda: gnn.Blur2d(),
            lambda: nn.Sequential(gnn.FIRUpsample2d(), gnn.FIRDownsample2d()),
            lambda: Both(nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 3, padding=1), draw.choice((torch.add, torch.mul, torch.sub))),
            lambda: Both(nn.Identity(), nn.Conv2d(c, c, 1), torch.maximum),
            lambda: Apply(_in_place),
            lambda: Apply(_spectrum),
            lambda: Apply(lambda x: x.transpose(2, 3).flip(2) + 0.1 * x.roll(1, 1) * x),
            lambda: Apply(lambda x: x.contiguous(memory_format=torch.channels_last)),
            lambda: Apply(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
            lambda: Blurred(),
            lambda: nn.Dropout2d(0.3),
        )
    )()  # fmt: skip


def _activation(draw: Draw) -> nn.Module:
    return draw.choice(
        (
            lambda: nn.LeakyReLU(0.2, inplace=draw.random() < 0.3),
            lambda: gnn.LeakyReLU(0.2),
            lambda: nn.ReLU(),
            lambda: gnn.ReLU(),
            lambda: nn.Tanh(),
            lambda: nn.SiLU(),
            lambda: nn.GELU(approximate=draw.choice(("none", "tanh"))),
            lambda: nn.Softplus(),
            lambda: nn.ELU(),
            lambda: nn.PReLU(),
            lambda: nn.Hardtanh(-1.5, 1.5),
            lambda: nn.Identity(),
        )
    )()


def _vector_layer(draw: Draw, f: int) -> nn.Module:
    return draw.choice(
        (
            lambda: nn.Linear(f, f, bias=draw.random() < 0.7),
            lambda: gnn.EqualizedLinear(f, f),
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(f, f)),
            lambda: gnn.utils.parametrizations.spectral_norm(nn.Linear(f, f)),
            lambda: nn.utils.spectral_norm(nn.Linear(f, f)),
            lambda: nn.LayerNorm(f),
            lambda: nn.BatchNorm1d(f),
            lambda: gnn.BatchNormAct1d(f),
            lambda: nn.Sequential(gnn.MinibatchDiscrimination(f, 3, 2), nn.Linear(f + 3, f)),
            lambda: nn.Sequential(gnn.MinibatchStdDev(2, 1, on_indivisible="whole_batch"), nn.Linear(f + 1, f)),
            lambda: nn.Sequential(nn.Unflatten(1, (2, f // 2)), Attention(f // 2, 1), nn.Flatten()),
            lambda: nn.Dropout(0.3),
            lambda: Both(nn.Linear(f, f), nn.Linear(f, f), torch.mul),
            lambda: Apply(lambda x: torch.softmax(x, 1) * x),
            lambda: Apply(lambda x: x / (x.norm(dim=1, keepdim=True) + 1)),
            lambda: Apply(lambda x: x.cumsum(1) / x.shape[1]),
            lambda: Apply(lambda x: torch.cat([x[:, 1:], x[:, :1] ** 2], 1)),
            lambda: Apply(lambda x: torch.where(x > 0, x.sin(), x)),
            lambda: (
                nn.Bilinear(f, f, f) if False else Both(nn.Identity(), nn.Linear(f, f), lambda a, b: a.lerp(b, 0.3))
            ),
            lambda: Apply(_in_place),
            lambda: Blurred(),
        )
    )()


class Critic(nn.Module):
    """Layers in a row, and a head; with a condition, the projection of the features on its embedding."""

    def __init__(self, body: nn.Module, features: int, conditional: bool, spread: bool) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, 1)
        self.embedding = nn.Embedding(5, features) if conditional else None
        self.spread = spread  # the outputs are [N, 1], not [N]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        features = self.body(x).flatten(1)
        output = self.head(features)
        if self.embedding is not None:
            embedded = self.embedding(y) if not y.is_floating_point() else y @ self.embedding.weight
            output = output + (features * embedded).sum(1, keepdim=True)
        return output if self.spread else output.squeeze(1)


def draw_critic(draw: Draw) -> tuple[nn.Module, tuple[int, ...], tuple[Any, ...]]:
    """A critic in double precision, the size of a batch, and its conditions."""
    torch.manual_seed(draw.randrange(2**31))
    batch = draw.choice((1, 2, 4, 6))
    layers: list[nn.Module] = []
    if draw.random() < 0.6:
        c, side = draw.choice((2, 4)), draw.choice((4, 6))
        shape: tuple[int, ...] = (batch, c, side, side)
        for _ in range(draw.randint(1, 4)):
            layers += [_image_layer(draw, c), _activation(draw)]
        features = c * side * side
    else:
        features = draw.choice((4, 6))
        shape = (batch, features)
        for _ in range(draw.randint(1, 4)):
            layers += [_vector_layer(draw, features), _activation(draw)]
    conditional = draw.random() < 0.3
    critic = Critic(nn.Sequential(*layers), features, conditional, draw.random() < 0.5).double()
    for module in critic.modules():
        if type(module).__name__ in ("BatchNorm1d", "BatchNormAct1d") and batch == 1:
            module.eval()  # one value a channel
    conditions: tuple[Any, ...] = ()
    if conditional:
        classes = torch.randint(5, (batch,), generator=draw.generator)
        conditions = (
            (classes,) if draw.random() < 0.6 else (F.one_hot(classes, 5).double() + draw.values((batch, 5), 0.1),)
        )
    if draw.random() < 0.2:
        critic.eval()
    if draw.random() < 0.2:
        for p in list(critic.parameters())[:: draw.randint(2, 3)]:
            p.requires_grad_(False)
    return critic, shape, conditions


def _norms(gradient: Tensor) -> Tensor:
    squares = gradient.flatten(1).square().sum(1)
    return torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).sqrt())


def _penalty(critic: nn.Module, x: Tensor, conditions: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x, *conditions).sum(), x, create_graph=True)
    if options["kind"] in ("r1", "r2"):
        each = gradient.flatten(1).square().sum(1) * (0.5 if options["half"] else 1)
    else:
        excess = _norms(gradient) - options["target"]
        each = (excess.clamp(min=0) if options["one_sided"] else excess).square()
    return options["weight"] * (each.mean() if options["reduction"] == "mean" else each.sum())


@contextlib.contextmanager
def _plain():
    """Layers of this library in plain torch, without what it does in double backward."""
    with gankern.use_implementation("reference"):
        yield


class _Even(torch.autograd.Function):
    """Cotangents in the order of their indices."""

    @staticmethod
    def forward(ctx, x):
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(memory_format=torch.contiguous_format)


def _has_batch_norm(critic: nn.Module) -> bool:
    return any("BatchNorm" in type(module).__name__ for module in critic.modules())


def _even(critic: nn.Module) -> None:
    """Lays out what torch's batch norm takes: of a batch of one in other strides its backward is wrong."""
    for module in critic.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.register_forward_pre_hook(lambda module, inputs: (_Even.apply(inputs[0]),))
            module.register_forward_hook(lambda module, inputs, output: _Even.apply(output))


def case(seed: int) -> Problem:
    problem = _case(seed, ())
    # Of a batch of one, torch's layers by themselves may be wrong: in the formula, and in our double backward.
    if problem and ", (1, " in problem:
        problem = _case(seed, ("formula",))
    if problem and ", (1, " in problem and ", tangent, " not in problem:
        problem = _case(seed, ("formula", "ours"))
    return problem


def _case(seed: int, even: Sequence[str]) -> Problem:
    draw = Draw(seed)
    critic, shape, conditions = draw_critic(draw)
    original = copy.deepcopy(critic)
    if "formula" in even:
        _even(original)
    if "ours" in even:
        _even(critic)
    samples = []
    for _ in range(2):
        x, form = draw.strided(draw.values(shape))
        # Of samples that are all the same, a batch norm makes rounding, whose sign an activation goes by.
        if form == "expanded" and _has_batch_norm(critic):
            x = draw.values(shape)
        # A mask is drawn in the order of memory, in which the formulas of our layers return other results than torch's.
        if any(isinstance(module, nn.Dropout) for module in critic.modules()):
            x = x.resolve_neg().contiguous()
        samples.append(x)
    real, fake = samples
    alpha = torch.rand(shape[0], generator=draw.generator, dtype=torch.float64)
    options = {
        "kind": draw.choice(("gp", "gp", "r1", "r2")),
        "weight": draw.choice((10.0, 0.5, 1.0)),
        "target": draw.choice((1.0, 1.0, 0.0, 0.3)),
        "one_sided": draw.random() < 0.3,
        "half": draw.random() < 0.5,
        "reduction": draw.choice(("mean", "sum")),
    }
    method = draw.choice(("auto", "auto", "tangent", "double_backward"))
    whole_step = draw.random() < 0.35
    random_state = draw.randrange(2**31)
    # Dropout draws other masks for a joint batch; torch's own backward of a group norm crashes for a channels_last input
    # that needs no gradient.
    whole_step = whole_step and not any(
        isinstance(m, (nn.Dropout, nn.Dropout2d, nn.GroupNorm)) for m in critic.modules()
    )
    text = f"{'critic_step' if whole_step else 'penalty'} {options}, {method}, {shape}, {critic}".replace("\n", " ")
    own = [x.clone() for x in (real, fake)]  # which a layer in place may write to
    points = {"gp": real.lerp(fake, alpha.view(-1, *[1] * (len(shape) - 1))), "r1": real, "r2": fake}[options["kind"]]

    # What is right.
    untouched = copy.deepcopy(original)
    torch.manual_seed(random_state)
    try:
        with _plain():
            right = _penalty(original, points.clone(), conditions, options)
            total = right
            if whole_step:
                real_output, fake_output = (original(x.clone(), *conditions) for x in own)
                total = right + fake_output.mean() - real_output.mean()
            if total.requires_grad:
                total.backward()
    except RuntimeError as error:
        # Not differentiable twice, or not at all: this library may not know better.
        torch_error: str | None = str(error)
    else:
        torch_error = None

    def penalty(critic, *samples, **more):
        common = dict(weight=options["weight"], reduction=options["reduction"], method=method, **more)
        if options["kind"] == "gp":
            return gp.gradient_penalty(critic, real, fake, alpha=alpha, target=options["target"],
                                       one_sided=options["one_sided"], **common)  # fmt: skip
        if options["kind"] == "r1":
            return gp.r1_penalty(critic, real, half=options["half"], **common)
        return gp.r2_penalty(critic, fake, half=options["half"], **common)

    modes = [m.training for m in critic.modules()]
    flags = [p.requires_grad for p in critic.parameters()]
    torch.manual_seed(random_state)
    try:
        if whole_step:
            step = gp.critic_step(critic, real, fake, penalty=penalty, critic_args=conditions)
            value, ours = step.penalty, step.loss
        else:
            value = ours = penalty(critic, critic_args=conditions)
        if ours.requires_grad:
            ours.backward()
    except gp.NotCovered:
        return None if method == "tangent" else f"{text}: NotCovered under {method}"
    except Exception as error:
        if "modified by an inplace operation" in str(error) and any(
            isinstance(module, (gnn.BiasAct, gnn.BiasActPixelNorm, gnn.LeakyReLU, gnn.ReLU))
            for module in critic.modules()
        ):
            return None  # these keep their results, and say so
        if torch_error is not None or (
            method == "tangent" and isinstance(error, ValueError) and "tangent" in str(error)
        ):
            return None
        return f"{text}: {type(error).__name__}: {error}"
    if torch_error is not None and "modified by an inplace operation" in torch_error:
        # A fused layer keeps less than torch's: then it is right if it is so without anything in place.
        original = untouched
        for module in original.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        torch.manual_seed(random_state)
        with _plain():
            right = total = _penalty(original, points.clone(), conditions, options)
            if whole_step:
                real_output, fake_output = (original(x.clone(), *conditions) for x in own)
                total = right + fake_output.mean() - real_output.mean()
            total.backward()
    elif torch_error is not None:
        return f"{text}: a value where torch has the error {torch_error}"
    if modes != [m.training for m in critic.modules()] or flags != [p.requires_grad for p in critic.parameters()]:
        return f"{text}: the critic's modes or flags are changed"
    if not difference(value, right) <= 1e-10 * (1 + abs(right.item())):
        return f"{text}: the penalty is {value.item()}, not {right.item()}"
    gradients = [p.grad for p in original.parameters() if p.grad is not None]
    scale = size(gradients) + 1e-3
    for (name, p), q in zip(critic.named_parameters(), original.parameters()):
        if (p.grad is None) != (q.grad is None):
            return f"{text}: {name}'s gradient is {_describe(p.grad)} where torch's is {_describe(q.grad)}"
        if p.grad is not None and not difference(p.grad, q.grad) <= 1e-9 * scale:
            return f"{text}: {name}'s gradient is off by {difference(p.grad, q.grad):.2e} of {scale:.2e}"
    joint = whole_step  # a shared batch is one power iteration, and one set of statistics
    for (name, b), c in zip(critic.named_buffers(), original.buffers()):
        if not joint and not difference(b, c) <= 1e-10:
            return f"{text}: buffer {name} is off by {difference(b, c):.2e}"
    return None


def _describe(gradient: Tensor | None) -> str:
    if gradient is None:
        return "None"
    return "numbers" if gradient.any() else "zeros"
