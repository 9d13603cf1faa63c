"""`gankern train`'s steps as CUDA graphs, on a real GPU; tests/training/test_replayed.py has what needs none."""

import pytest
import torch

from gankern import data, training
from gankern.training import replayed
from gankern.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = dict(width=16, batch_size=16, steps=9, threads=1, device="cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("sn_dcgan", {"ema": 0.9}),
        ("wgan_gp", {"n_critic": 2, "penalty_every": 2, "decay_steps": 20}),
        ("progan", {"grow_steps": 3, "size": 8}),
    ],
    ids=["sn_dcgan", "wgan_gp", "progan"],
)
def test_steps_by_graphs_train_as_those_without(model, options, precision, monkeypatch):
    images = data.load("digits")
    config = training.configure(model, "digits", images, **SMALL, **options, precision=precision)
    runs = []
    for graphs in ("0", "1"):
        monkeypatch.setenv(replayed.VARIABLE, graphs)
        trainer = Trainer(config, "gankern", images)
        runs.append([list(trainer.step().losses.values()) for _ in range(9)])
        assert (trainer.replays is not None) == (graphs == "1")  # and no step was refused
    eager, replays = map(torch.tensor, runs)
    # Both first steps run as they are; later ones amplify what libraries' algorithms differ by.
    tight = 1e-4 if precision == "fp32" else 3e-2
    torch.testing.assert_close(replays[:2], eager[:2], rtol=tight, atol=tight)
    torch.testing.assert_close(replays, eager, rtol=0.2, atol=0.2)
