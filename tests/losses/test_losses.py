"""Every loss against its closed form in NumPy, in fp64, and at logits where a naive form overflows."""

import numpy as np
import pytest
import torch

from gankern import losses

RANDOM = np.random.default_rng(0)
REAL, FAKE = RANDOM.normal(0, 3, 50), RANDOM.normal(0, 3, 40)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cross_entropy(real, fake):
    return -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean()


CLOSED_FORMS = {
    "minimax": (cross_entropy, lambda f: np.log(1 - sigmoid(f)).mean()),
    "non_saturating": (cross_entropy, lambda f: -np.log(sigmoid(f)).mean()),
    "maximum_likelihood": (cross_entropy, lambda f: -0.5 * (sigmoid(f) / (1 - sigmoid(f))).mean()),
    "hinge": (
        lambda r, f: np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean(),
        lambda f: -f.mean(),
    ),
    "least_squares": (
        lambda r, f: 0.5 * ((r - 1) ** 2).mean() + 0.5 * (f**2).mean(),
        lambda f: 0.5 * ((f - 1) ** 2).mean(),
    ),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
}


def test_every_loss_has_a_closed_form_here():
    assert CLOSED_FORMS.keys() == losses.LOSSES.keys()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name):
    discriminator, generator = CLOSED_FORMS[name]
    loss = losses.get(name)
    real, fake = torch.from_numpy(REAL), torch.from_numpy(FAKE)
    np.testing.assert_allclose(loss.discriminator(real, fake).item(), discriminator(REAL, FAKE), rtol=1e-12)
    np.testing.assert_allclose(loss.generator(fake).item(), generator(FAKE), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in CLOSED_FORMS if name != "maximum_likelihood"])
def test_finite_with_live_gradients_at_extreme_logits(name):
    loss = losses.get(name)
    wrong_real = torch.full((4,), -500.0, requires_grad=True)
    wrong_fake = torch.full((4,), 500.0, requires_grad=True)
    loss.discriminator(wrong_real, wrong_fake).backward()
    assert wrong_real.grad.isfinite().all() and (wrong_real.grad < 0).all()
    assert wrong_fake.grad.isfinite().all() and (wrong_fake.grad > 0).all()
    assert loss.generator(torch.tensor([-500.0, 500.0])).isfinite()


def test_non_saturating_teaches_where_minimax_does_not():
    fake = torch.tensor([-30.0], requires_grad=True)
    (minimax,) = torch.autograd.grad(losses.minimax_generator(fake), fake)
    (non_saturating,) = torch.autograd.grad(losses.non_saturating_generator(fake), fake)
    assert abs(minimax.item()) < 1e-12
    assert non_saturating.item() == pytest.approx(-1.0)


def test_one_sided_label_smoothing():
    real, fake = torch.from_numpy(REAL), torch.from_numpy(FAKE)
    expected = (
        -(0.9 * np.log(sigmoid(REAL)) + 0.1 * np.log(1 - sigmoid(REAL))).mean() - np.log(1 - sigmoid(FAKE)).mean()
    )
    got = losses.cross_entropy_discriminator(real, fake, real_target=0.9).item()
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    # Its minimum over a real logit is where D(x) = 0.9, not at infinity.
    best = torch.tensor([np.log(9.0)], requires_grad=True)
    losses.cross_entropy_discriminator(best, fake, real_target=0.9).backward()
    assert abs(best.grad.item()) < 1e-12


def test_label_smoothing_by_name():
    real, fake = torch.from_numpy(REAL), torch.from_numpy(FAKE)
    smooth = losses.get("non_saturating", real_target=0.9)
    assert smooth.discriminator(real, fake) == losses.cross_entropy_discriminator(real, fake, 0.9)
    assert smooth.generator is losses.non_saturating_generator
    with pytest.raises(ValueError, match="the hinge loss has no labels to smooth .* minimax, non_saturating"):
        losses.get("hinge", real_target=0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_half_precision_logits(name, dtype):
    """The loss of half-precision logits is the fp32 loss of their values: exp(12) would overflow fp16."""
    real, fake = torch.linspace(-12, 12, 37).to(dtype), torch.linspace(-12, 12, 41).to(dtype)
    loss = losses.get(name)
    for got, expected in [
        (loss.discriminator(real, fake), loss.discriminator(real.double(), fake.double())),
        (loss.generator(fake), loss.generator(fake.double())),
    ]:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [0.0, 1.1, -1.0, float("nan")])
def test_label_smoothing_refuses(target):
    with pytest.raises(ValueError, match="real_target"):
        losses.cross_entropy_discriminator(torch.zeros(1), torch.zeros(1), real_target=target)


def test_feature_matching():
    real, fake = RANDOM.normal(size=(6, 3, 2, 2)), RANDOM.normal(size=(4, 3, 2, 2))
    features = torch.from_numpy(fake).requires_grad_()
    target = torch.from_numpy(real).requires_grad_()
    loss = losses.feature_matching(target, features)
    np.testing.assert_allclose(loss.item(), ((real.mean(0) - fake.mean(0)) ** 2).sum(), rtol=1e-12)
    loss.backward()
    assert target.grad is None
    np.testing.assert_allclose(features.grad[0], 2 / 4 * (fake.mean(0) - real.mean(0)), rtol=1e-12)
    with pytest.raises(ValueError, match="one layer"):
        losses.feature_matching(torch.zeros(2, 3), torch.zeros(2, 4))


def test_historical_average():
    values = RANDOM.normal(size=(5, 3))
    theta = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    average = losses.HistoricalAverage([theta])
    for t, value in enumerate(values, start=1):
        theta.data = torch.from_numpy(value.copy())
        theta.grad = None
        penalty = average()
        difference = value - values[:t].mean(0)
        np.testing.assert_allclose(penalty.item(), (difference**2).sum(), atol=1e-14)
        penalty.backward()
        np.testing.assert_allclose(theta.grad, 2 * difference, atol=1e-14)

    resumed = losses.HistoricalAverage([theta])
    resumed.load_state_dict(average.state_dict())
    assert resumed().item() == average().item()


def test_clip_weights():
    layer = torch.nn.Linear(30, 30)
    losses.clip_weights_(layer.parameters(), 0.05)
    assert all(p.abs().max() <= 0.05 for p in layer.parameters())
    with pytest.raises(ValueError, match="limit"):
        losses.clip_weights_(layer.parameters(), 0.0)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match=r"unknown loss 'wasserstien'; did you mean wasserstein\?"):
        losses.get("wasserstien")


BAD = [None, "real", [0.5], 3.0, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.complex64)]


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_what_is_no_tensor_of_logits_is_named(name, bad):
    loss, good = losses.get(name), torch.zeros(4)
    for call, argument in (
        (lambda: loss.discriminator(bad, good), "real"),
        (lambda: loss.discriminator(good, bad), "fake"),
        (lambda: loss.generator(bad), "fake"),
        (lambda: losses.feature_matching(bad, good), "real"),
        (lambda: losses.feature_matching(good, bad), "fake"),
    ):
        with pytest.raises(TypeError, match=f"{argument} must (be a tensor|hold floating-point numbers)"):
            call()


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_mean_of_nothing_is_refused(name):
    loss, good, empty = losses.get(name), torch.zeros(4), torch.zeros(0)
    for call, argument in (
        (lambda: loss.discriminator(empty, good), "real"),
        (lambda: loss.discriminator(good, empty), "fake"),
        (lambda: loss.generator(empty), "fake"),
        (lambda: losses.feature_matching(torch.zeros(0, 3), torch.zeros(2, 3)), "real"),
    ):
        with pytest.raises(ValueError, match=f"{argument} is empty"):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.get(None), "loss must be a name, got None"),
        (lambda: losses.get(["hinge"]), "loss must be a name, got a list"),
        (lambda: losses.get("minimax", None), "real_target must be a number, got None"),
        (lambda: losses.get("minimax", "0.9"), "real_target must be a number, got '0.9'"),
        (lambda: losses.cross_entropy_discriminator(torch.zeros(1), torch.zeros(1), None), "real_target must be a number"),
        (lambda: losses.feature_matching(torch.tensor(1.0), torch.tensor(1.0)), r"real must be \[N, ...\]"),
        (lambda: losses.clip_weights_(None), "parameters must be several tensors, got None"),
        (lambda: losses.clip_weights_(torch.zeros(3)), "parameters must be several tensors, got a tensor"),
        (lambda: losses.clip_weights_([torch.zeros(3), None]), "each of parameters must be a tensor, got None"),
        (lambda: losses.clip_weights_([torch.zeros(3)], "0.1"), "limit must be a number, got '0.1'"),
        (lambda: losses.HistoricalAverage(None), "parameters must be several tensors, got None"),
        (lambda: losses.HistoricalAverage([]), "parameters is empty"),
        (lambda: losses.HistoricalAverage([torch.zeros(3)]).load_state_dict({"steps": "2", "averages": []}), "steps must be"),
        (lambda: losses.HistoricalAverage([torch.zeros(3)]).load_state_dict({"steps": 2, "averages": [torch.zeros(2)]}), "of other parameters"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()
