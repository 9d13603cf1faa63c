"""Several processes share a batch: two of them, connected by gloo, have the numbers of one with the whole batch."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gankern.nn as gnn
from gankern import data, models, training
from gankern.models import layers
from gankern.nn import coupling
from gankern.training import checkpoint as checkpoints
from gankern.training import parallel

pytest.importorskip("lightning_fabric")

COMMON = {"threads": 1, "steps": 2, "checkpoint_every": 2, "n_critic": 1, "latent": 4}
# name → model, data, options, whether two processes have one's numbers
RUNS = {
    "points": (
        "wgan_gp_toy",
        "8gaussians",
        {"width": 16, "batch_size": 32, "latent": 2, "ema": 0.9, "evaluate": 1},
        True,
    ),
    "parts": ("wgan_gp_toy", "8gaussians", {"width": 16, "batch_size": 32, "latent": 2, "accumulate": 2}, True),
    "wgan_gp, local": ("wgan_gp", "digits", {"width": 4, "batch_size": 8}, False),
    "wgan_gp, global": ("wgan_gp", "digits", {"width": 4, "batch_size": 8, "coupled": "global"}, True),
    "progan, local": ("progan", "digits", {"width": 8, "batch_size": 16, "grow_steps": 1}, False),
    "progan, global": ("progan", "digits", {"width": 8, "batch_size": 16, "grow_steps": 1, "coupled": "global"}, True),
    "progan, global, torch": (
        "progan",
        "digits",
        {"width": 8, "batch_size": 16, "grow_steps": 1, "coupled": "global", "layers": "torch"},
        True,
    ),
    "similarity, global": (
        "dcgan",
        "digits",
        {"width": 4, "batch_size": 8, "minibatch_discrimination": 4, "coupled": "global", "conditioning": "projection"},
        True,
    ),
}


def train(folder: Path) -> None:
    """Every run, one after the other; in as many processes as were launched."""
    for name, (model, of, options, _) in RUNS.items():
        samples = data.load(of)
        labels = data.labels(of) if "conditioning" in options else None
        config = training.configure(model, of, samples, labels, **COMMON | {"evaluate_samples": 100} | options)
        training.train(config, samples, folder / name, labels=labels)


def launch(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    done = launch(__file__, two)
    assert done.returncode == 0, done.stdout + done.stderr
    train(one)
    return one, two


def differences(a, b):
    """Of two state_dicts, each tensor's largest difference, relative to its largest value, or to 0.1.

    The bias before a batch norm has a gradient of 0, and Adam makes whole steps of what rounding leaves of it.
    """
    return {
        key: (a[key].double() - b[key].double()).abs().max().item() / max(0.1, a[key].double().abs().max().item())
        for key in a
        if a[key].is_floating_point() and a[key].numel()
    }


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_numbers_of_one(folders, name):
    one, two = (checkpoints.load(folder / name / training.CHECKPOINT) for folder in folders)
    side = one.config.layers
    losses = [saved.history["steps"][side][:, :2] for saved in (one, two)]
    if not RUNS[name][-1]:
        assert (losses[0] - losses[1]).abs().max() > 1e-4  # each process's layers saw a half of the batch
        return
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for player in ("generator", "discriminator"):
        found = differences(one.trainers[side][player], two.trainers[side][player])
        assert max(found.values()) < 2e-3, (player, found)
    assert torch.equal(one.trainers[side]["random_state"], two.trainers[side]["random_state"])


def test_what_the_first_process_leaves(folders):
    one, two = folders
    for name in RUNS:
        assert {path.name for path in (one / name).iterdir()} == {path.name for path in (two / name).iterdir()}


def test_the_command_under_torchrun(tmp_path):
    out = tmp_path / "run"
    options = ["--width", 8, "--batch-size", 16, "--steps", 2, "--threads", 1, "--evaluate-samples", 100, "--out", out]
    done = launch("-m", "gankern.cli", "train", "wgan_gp_toy", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("whole step") == 1  # one process tells
    saved = checkpoints.load(out / training.CHECKPOINT)
    assert saved.step == 2
    # Another number of processes may go on.
    samples = data.load("8gaussians")
    training.train(training.reconfigure(saved.config, steps=4), samples, out, saved)
    assert checkpoints.load(out / training.CHECKPOINT).step == 4


def test_coupled_layers_are_found():
    def names(model, **options):
        gan = models.build(model, layers="gankern", width=4, latent=4, **options)
        return [sorted(parallel.coupled_layers(network)) for network in (gan.generator, gan.discriminator)]

    assert names("wgan_gp_toy") == [[], []]
    generator, critic = names("wgan_gp", size=8)
    assert len(generator) == 3 and critic == []
    assert names("progan", size=8) == [[], ["blocks.0.0"]]
    assert names("dcgan", size=16, minibatch_discrimination=2)[1] == ["head.similarity", "main.3"]
    assert names("sn_dcgan", size=8, generator_norm="virtual") == [[], []]


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_what_is_not_known_to_couple_is_refused():
    with pytest.raises(ValueError, match=r"coupled='global': layer '1' of Sequential may couple .*Centred.*apart or"):
        parallel.couple_globally(nn.Sequential(nn.Linear(2, 2), Centred()))
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda module, args, output: output - output.mean(0))
    with pytest.raises(ValueError, match="hooks, or methods of its own"):
        parallel.couple_globally(hooked)


def test_coupled_layers_of_torch():
    """One service says which they are: batch norm, instance norm that keeps statistics, what says so of itself."""
    net = nn.ModuleDict(
        {
            "batch": nn.BatchNorm1d(2), "fused": gnn.BatchNormAct2d(2), "own": layers.MinibatchStdDev(),
            "kept": nn.InstanceNorm2d(2, track_running_stats=True), "alone": nn.InstanceNorm2d(2), "linear": nn.Linear(2, 2),
            "virtual": gnn.VirtualBatchNorm2d(2), "similar": gnn.MinibatchDiscrimination(2, 2, 2),
        }
    )  # fmt: skip
    assert sorted(coupling.coupled_layers(net)) == ["batch", "fused", "kept", "own", "similar"]
    assert coupling.unknown_layers(net) == {}


def test_parts_of_a_batch_are_warned_of():
    def trainer(model, **options):
        of = "8gaussians" if model == "wgan_gp_toy" else "digits"
        samples = data.load(of)
        config = training.configure(model, of, samples, None, **COMMON | {"batch_size": 8, "accumulate": 2} | options)
        return training.Trainer(config, "gankern", samples)

    with pytest.warns(UserWarning, match="accumulate is 2: .* couples the samples of a batch, or may"):
        trainer("progan", width=8, grow_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer("wgan_gp_toy", width=16, latent=2)


def test_a_process_alone():
    alone = parallel.start("cpu")
    assert (alone.rank, alone.number, alone.device.type) == (0, 1, "cpu")
    assert alone.largest(True) == 1


if __name__ == "__main__":
    train(Path(sys.argv[1]))
