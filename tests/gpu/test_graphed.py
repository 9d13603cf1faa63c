"""Whole training steps as CUDA graphs: the same losses and weights as the eager step's. `make gpu` runs this."""

import pytest
import torch

import gankern
from gankern import losses, models
from gankern.penalties import GradientPenalty, critic_step
from gankern.training import GraphedStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# model → its loss, whether it has a penalty, options of models.build
MODELS = {
    "dcgan": ("non_saturating", False, {"size": 32, "width": 16}),
    "sngan": ("hinge", False, {"size": 32, "width": 16}),
    "wgan_gp": ("wasserstein", True, {"size": 32, "width": 16}),
    "progan": ("wasserstein", True, {"size": 16, "width": 16}),
}


def make(model, dtype):
    """Networks, optimisers, and a step of (real images, latents, interpolation weights)."""
    name, penalized, options = MODELS[model]
    torch.manual_seed(0)
    gan = models.build(model, layers="gankern", **options)
    g, d = gan.generator.cuda(), gan.discriminator.cuda()
    g_optimiser, d_optimiser = (torch.optim.Adam(n.parameters(), 1e-4, (0.0, 0.9), capturable=True) for n in (g, d))
    loss = losses.get(name)

    def step(real, latents, alpha):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            d_optimiser.zero_grad()
            with torch.no_grad():
                fake = g(latents).to(real.dtype)
            penalty = GradientPenalty(alpha=alpha) if penalized else None
            result = critic_step(d, real, fake, loss=loss.discriminator, penalty=penalty)
        result.loss.backward()
        d_optimiser.step()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            g_optimiser.zero_grad()
            g_loss = loss.generator(d(g(latents)))
        g_loss.backward(inputs=list(g.parameters()))
        g_optimiser.step()
        return result.loss, g_loss

    return (g, d), (g_optimiser, d_optimiser), step, gan.latent, options["size"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_graphed_step_trains_as_the_eager_one(model, dtype):
    torch.manual_seed(1)
    runs = []
    for graphed in (False, True):
        networks, optimisers, step, latent, size = make(model, dtype)
        random = torch.Generator("cuda").manual_seed(2)
        batches = [
            (
                torch.rand(8, 3, size, size, device="cuda", generator=random) * 2 - 1,
                torch.randn(8, latent, device="cuda", generator=random),
                torch.rand(8, 1, 1, 1, device="cuda", generator=random),
            )
            for _ in range(6)
        ]
        if graphed:
            step = GraphedStep(step, batches[0], networks, optimisers)
        runs.append([torch.stack([x.detach().float() for x in step(*batch)]) for batch in batches])
    eager, replayed = (torch.stack(run) for run in runs)
    assert eager.isfinite().all()
    # The first step is the same; later ones amplify what libraries' algorithms differ by.
    torch.testing.assert_close(replayed[0], eager[0], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
    torch.testing.assert_close(replayed, eager, rtol=0.1, atol=0.1)


def test_what_waits_for_the_device_is_refused():
    networks, optimisers, step, latent, size = make("dcgan", torch.float32)
    inputs = tuple(torch.zeros(4, *shape, device="cuda") for shape in ((3, size, size), (latent,), (1, 1, 1)))
    before = [x.clone() for network in networks for x in network.state_dict().values()]
    with pytest.raises(RuntimeError, match="cannot be captured"):
        GraphedStep(lambda *batch: step(*batch)[0].item(), inputs, networks, optimisers)
    after = [x for network in networks for x in network.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before))


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_step_that_ran_on_the_default_stream_before_can_be_captured(accelerated):
    """torch's hook keeps the weight that it made, and with it the parameters' nodes of that stream."""
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        norm = torch.nn.utils.spectral_norm
        network = torch.nn.Sequential(
            norm(torch.nn.Conv2d(3, 8, 3)), torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), norm(torch.nn.Linear(288, 1))
        ).cuda()
        if accelerated:
            gankern.accelerate(network)
        optimiser = torch.optim.Adam(network.parameters(), 1e-3, capturable=True)

        def step(x, network=network, optimiser=optimiser):
            optimiser.zero_grad()
            loss = network(x).mean()
            loss.backward()
            optimiser.step()
            return loss.detach()

        batches = torch.randn(5, 4, 3, 8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        for x in batches[:2]:
            step(x)
        train = GraphedStep(step, (batches[0],), (network,), (optimiser,)) if graphed else step
        results.append(torch.stack([train(x).clone() for x in batches]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
