"""Critics that are drawn, accelerated, against the same in double precision: outputs, gradients and buffers while
training and in evaluation, at several sizes of a batch, after attributes changed; and restored to the bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from drawing import Draw, Problem, difference
from penalties import draw_critic
from torch import Tensor, nn

import gankern
from gankern.acceleration import _convolutions, _functions, _root, _spectral

# What is for large tensors alone is done for these small ones too.
_functions.FROM, _convolutions.CALL, _spectral.FROM = {"cpu": 0}, -math.inf, 0
_root.Gains.operation = _root.Gains.forward = _root.Gains.layer = 0.0


def _seen(model: nn.Module, x: Tensor, conditions: tuple[Any, ...], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x, *conditions)
    output.square().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [output.detach(), x.grad, *gradients, *(b.clone() for b in model.buffers())]


def case(seed: int) -> Problem:
    draw = Draw(seed)
    critic, shape, conditions = draw_critic(draw)
    original = copy.deepcopy(critic)
    text = f"{shape}, {critic}".replace("\n", " ")
    gankern.accelerate(critic)
    for round_ in range(3):
        training = draw.random() < 0.5 and shape[0] > 1
        batch = shape[0] if conditions else draw.choice((1, 2, 3, 8))
        training = training and batch > 1
        changed = draw.choice((None, "momentum", "eps", "negative_slope", "p", "alpha"))
        value = draw.choice((0.1, 0.3))
        for model in (critic, original):
            model.train(training)
            for module in model.modules():
                if isinstance(getattr(module, changed or "", None), float):
                    setattr(module, changed, value)
        x, form = draw.strided(draw.values((batch, *shape[1:])))
        # Of samples that are all the same, a batch norm makes rounding, whose sign an activation goes by.
        x = x.resolve_neg().clone() if form != "expanded" else draw.values(x.shape)
        random_state = draw.randrange(2**31)
        try:
            right = _seen(original, x, conditions, random_state)
        except RuntimeError:
            return None  # an operation in place that torch itself refuses
        ours = _seen(critic, x, conditions, random_state)
        scale = max(t.abs().max().item() for t in right if t.is_floating_point() and t.numel()) + 1
        for i, (a, b) in enumerate(zip(ours, right, strict=True)):
            if not difference(a, b) <= 1e-10 * scale:
                return (
                    f"{text}, {changed}: in round {round_} number {i} is off by {difference(a, b):.2e} of {scale:.2e}"
                )
    original.load_state_dict(critic.state_dict())
    gankern.restore(critic)
    if any(not torch.equal(a, b) for a, b in zip(_seen(critic, x, conditions, 1), _seen(original, x, conditions, 1))):
        return f"{text}: not restored to the bit"
    return None
