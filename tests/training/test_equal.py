"""Both sets of layers train the same: in double precision whole steps of every model agree, where rounding cannot hide a
mistake."""

import pytest
import torch

from gankern import data, training

# The losses of a step depend on all weights, so they say whether the steps before were the same. The weights themselves
# say less: a bias before a batch norm has no gradient but rounding, which Adam makes as large as any other.
MODELS = {
    "gan": {"width": 10},
    "dcgan": {"width": 4},
    "wgan": {"width": 4, "n_critic": 2},
    "wgan_gp": {"width": 4, "n_critic": 2},
    "sn_dcgan": {"width": 4},
    "sngan": {"width": 4},
    "progan": {"width": 4, "grow_steps": 1},
}


@pytest.mark.parametrize("model", MODELS)
def test_the_same_losses_in_double_precision(double, model):
    options = {"latent": 8, "batch_size": 4, "threads": 1, "steps": 4} | MODELS[model]
    images = data.load("digits", size=32 if model == "sngan" else 16)[:64].double()
    config = training.configure(model, "digits", images, **options)
    stock, ours = (training.Trainer(config, layers, images) for layers in ("torch", "gankern"))
    for _ in range(config.steps):
        a, b = stock.step(), ours.step()
        torch.testing.assert_close((b.d_loss, b.g_loss), (a.d_loss, a.g_loss), rtol=1e-10, atol=1e-10)
