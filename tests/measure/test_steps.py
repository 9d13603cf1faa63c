"""Whole training steps: every variant trains the same model on the same images."""

import pytest
import torch

from gankern import models
from gankern.measure import steps
from gankern.measure.benchmark import ACCELERATED, OURS
from gankern.measure.steps import Play, Step

STEPS = [
    Step("dcgan", "dcgan", 4, "non_saturating", options={"size": 16, "width": 8}),
    Step("sngan", "sngan", 2, "hinge", options={"size": 32, "width": 8}),
]
PENALIZED = Step("wgan_gp", "wgan_gp", 3, "wasserstein", True, options={"size": 16, "width": 8})
GROWN = Step("progan", "progan", 4, "wasserstein", True, drift=1e-3, options={"size": 8, "width": 8})


def after_one(step, variant, monkeypatch):
    built, build = [], models.build
    monkeypatch.setattr(models, "build", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
    steps.make_step(step, variant, "cpu")()
    monkeypatch.undo()
    (gan,) = built
    return [p.detach().clone() for network in (gan.generator, gan.discriminator) for p in network.parameters()]


@pytest.mark.parametrize("variant", [OURS, ACCELERATED])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_all_variants_take_the_same_step(step, variant, monkeypatch):
    expected = after_one(step, "torch", monkeypatch)
    ours = after_one(step, variant, monkeypatch)
    # Adam's first step is the learning rate times a sign: where a gradient is rounding, the sign is.
    difference = torch.cat([(a - b).abs().flatten() for a, b in zip(ours, expected, strict=True)])
    assert difference.mean() < 0.02 * step.lr


@pytest.mark.parametrize("step", [PENALIZED, GROWN], ids=lambda step: step.name)
def test_measured_with_a_penalty(step):
    result = steps.measure(step, "cpu", compiled=False, seconds=0)
    assert result.peer == "torch"
    assert all(contender.median for contender in result.contenders.values())
    spent = steps.breakdown(step, OURS, "cpu")
    assert spent["gradient penalty"] > 0 and spent["convolution"] > 0 and spent["optimiser"] > 0


GAMES = [
    Play("pix2pix", "pix2pix", 2, 16, settings={"width": 4}),
    Play("cyclegan", "cyclegan", 1, 16, settings={"width": 4, "options": {"blocks": 1}}),
    Play("srgan", "srgan", 2, 16, settings={"width": 8, "options": {"blocks": 1, "features": 8, "mse_steps": 0}}),
    Play("sagan", "sagan", 2, 32, 2, settings={"width": 4, "latent": 8}),
]


@pytest.mark.parametrize("step", GAMES, ids=lambda step: step.name)
def test_games_take_the_same_step(step, monkeypatch):
    """The losses of two steps: of the same weights, images and random numbers, and of the same updates."""
    found = {}
    for variant in ("torch", OURS, ACCELERATED):
        play = steps.make_step(step, variant, "cpu")
        found[variant] = [loss for _ in range(2) for loss in play().losses.values()]
    assert found[OURS] == pytest.approx(found["torch"], rel=2e-3, abs=2e-3)
    assert found[ACCELERATED] == pytest.approx(found["torch"], rel=2e-3, abs=2e-3)
    assert steps.modes_of("cuda", step) == (steps.WHOLE_STEP,)


def test_graphs_meet_graphs_on_cuda(monkeypatch):
    """torch's step as a CUDA graph is the peer of gankern's; here with the step itself in the graph's place."""
    assert steps.modes_of("cpu") == (steps.WHOLE_STEP,)
    assert steps.modes_of("cuda") == steps.modes_of("cuda:1") == (steps.WHOLE_STEP, steps.GRAPHED_STEP)
    captured = []

    def graph(train, inputs, networks, optimisers):
        captured.append((len(inputs), len(networks), len(optimisers)))
        return train

    monkeypatch.setattr(steps, "GraphedStep", graph)
    result = steps.measure(STEPS[0], "cpu", compiled=True, seconds=0, mode=steps.GRAPHED_STEP)
    assert list(result.contenders) == [OURS, ACCELERATED, "torch, graphed"]
    assert result.mode == "whole step, graphed" and result.peer == "torch, graphed" and result.ratio
    assert captured == [(2, 2, 2)] * 3


def test_fast_steps_are_bfloat16_in_channels_last(monkeypatch):
    seen = []
    convolution = torch.nn.functional.conv2d

    def watched(x, *args, **options):
        y = convolution(x, *args, **options)
        seen.append((y.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        return y

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    result = steps.measure(STEPS[0], "cpu", compiled=False, seconds=0, fast=True)
    assert result.dtype == "bfloat16" and result.peer == "torch"
    assert seen and set(seen) == {(torch.bfloat16, True)}
