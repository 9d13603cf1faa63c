"""gankern.theory against closed forms and, where there is none, against another way to the same number."""

import math

import pytest
import torch

from gankern import theory

LOG2, LOG4 = math.log(2.0), math.log(4.0)
X = torch.linspace(-20.0, 30.0, 50_001, dtype=torch.float64)
DX = 1e-3


def gaussian(mean, std=1.0):
    return torch.exp(-0.5 * ((X - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


# t: KL, JS, V(D*) of N(0, 1) and N(t, 1)
SHIFTED = {
    0.5: (0.125, 0.030311, -1.325672),
    1.0: (0.5, 0.111421, -1.163451),
    2.0: (2.0, 0.336831, -0.712633),
    4.0: (8.0, 0.632720, -0.120854),
    8.0: (32.0, 0.693054, -0.000187),
}


@pytest.mark.parametrize("t", SHIFTED)
def test_divergences_of_shifted_gaussians(t):
    p, q = gaussian(0.0), gaussian(t)
    kl, js, value = SHIFTED[t]
    assert theory.kullback_leibler(p, q, DX) == pytest.approx(0.5 * t * t, abs=1e-9) == pytest.approx(kl)
    assert theory.kullback_leibler(q, p, DX) == pytest.approx(kl, abs=1e-9)
    assert theory.jensen_shannon(p, q, DX) == pytest.approx(js, abs=6e-7)
    assert theory.game_value(p, q, dx=DX) == pytest.approx(value, abs=6e-7)
    # Φ(t/2) − Φ(−t/2) = erf(t / (2·sqrt 2))
    assert theory.total_variation(p, q, DX) == pytest.approx(math.erf(t / 2.0 / math.sqrt(2.0)), abs=1e-7)
    assert theory.wasserstein_by_cdf(X, p * DX, q * DX) == pytest.approx(t, abs=1e-8)
    d = theory.optimal_logit(p, q)
    torch.testing.assert_close(d, -t * X + 0.5 * t * t, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(theory.optimal_discriminator(p, q), d.sigmoid(), rtol=1e-10, atol=0)
    assert theory.game_value(p, q, d, DX) == pytest.approx(theory.game_value(p, q, dx=DX), abs=1e-12)
    for other in (0.9 * d, d + 0.1, torch.zeros_like(d)):
        assert theory.game_value(p, q, other, DX) < theory.game_value(p, q, dx=DX)


def test_divergences_of_different_widths():
    p, q = gaussian(0.0, 1.0), gaussian(1.0, 2.0)
    closed = LOG2 + (1.0 + 1.0) / 8.0 - 0.5  # log(s₂/s₁) + (s₁² + (m₁ − m₂)²)/(2·s₂²) − ½
    assert theory.kullback_leibler(p, q, DX) == pytest.approx(closed, abs=1e-9)
    assert theory.kullback_leibler(q, p, DX) == pytest.approx(-LOG2 + 5.0 / 2.0 - 0.5, abs=1e-9)


def test_where_they_do_not_meet():
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.25, 0.75])
    assert theory.kullback_leibler(p, q) == theory.kullback_leibler(q, p) == math.inf
    assert theory.jensen_shannon(p, q) == pytest.approx(LOG2, abs=1e-15)
    assert theory.total_variation(p, q) == 1.0
    assert theory.game_value(p, q) == pytest.approx(0.0, abs=1e-15)
    d = theory.optimal_discriminator(p, q)
    assert d.tolist() == [1.0, 1.0, 0.0, 0.0]
    d = theory.optimal_logit(p, q)
    assert d.tolist() == [math.inf, math.inf, -math.inf, -math.inf]
    assert theory.game_value(p, q, d) == 0.0
    assert theory.game_value(p, q, -d) == -math.inf
    assert theory.kullback_leibler(p, p) == theory.jensen_shannon(p, p) == theory.total_variation(p, p) == 0.0
    assert theory.game_value(p, p) == pytest.approx(-LOG4, abs=1e-15)


def test_a_support_inside_another():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    assert theory.kullback_leibler(p, q) == math.inf
    assert theory.kullback_leibler(q, p) == pytest.approx(LOG2)
    assert theory.jensen_shannon(p, q) == pytest.approx(0.75 * math.log(4.0 / 3.0), abs=1e-15)


def test_the_least_numbers_there_are():
    """Densities that underflow: ratios stay, and nothing becomes NaN."""
    tiny = torch.tensor([5e-324, 1e-310], dtype=torch.float64)
    large = torch.tensor([1e308, 0.0], dtype=torch.float64)
    assert theory.optimal_discriminator(tiny, tiny).tolist() == [0.5, 0.5]
    assert theory.optimal_discriminator(large, large).tolist()[0] == 0.5
    assert theory.optimal_discriminator(torch.zeros(2), torch.zeros(2)).isnan().all()
    p = torch.tensor([1.0, 5e-324], dtype=torch.float64)
    q = torch.tensor([5e-324, 1.0], dtype=torch.float64)
    assert theory.kullback_leibler(p, q) == pytest.approx(1074 * LOG2)
    assert theory.jensen_shannon(p, q) == pytest.approx(LOG2)


def test_on_planes_as_on_lines():
    p, q = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = p / p.sum(), q / q.sum()
    flat = [theory.jensen_shannon(p.flatten(), q.flatten()), theory.kullback_leibler(p.flatten(), q.flatten())]
    assert [theory.jensen_shannon(p, q), theory.kullback_leibler(p, q)] == flat
    assert theory.jensen_shannon(p.float(), q.half() / q.half().double().sum()) == pytest.approx(flat[0], abs=1e-3)


@pytest.mark.parametrize("function", ["kullback_leibler", "jensen_shannon", "total_variation", "game_value"])
def test_what_is_no_density(function):
    call, half = getattr(theory, function), torch.tensor([0.5, 0.5])
    for p, q, word in [
        (torch.tensor([0.5, 0.6]), half, "p must have the mass 1"),
        (half, torch.tensor([1.5, -0.5]), "q must not be negative"),
        (half, torch.ones(3) / 3, r"one shape, got \(2,\) and \(3,\)"),
        (half, torch.tensor([0.5, math.nan]), "q has values that are not finite"),
        (torch.empty(0), torch.empty(0), "p must be at least one number"),
    ]:
        with pytest.raises(ValueError, match=word):
            call(p, q)
    for bad in ([0.5, 0.5], half.bool(), half.to(torch.complex64)):
        with pytest.raises(TypeError, match=f"{function}: p must"):
            call(bad, half)
    for dx in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="dx must be a positive number"):
            call(half, half, dx=dx)
    with pytest.raises(ValueError, match="mass 1"):
        call(half, half, dx=0.5)


def test_logits_of_a_game():
    half, one = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    assert theory.optimal_logit(half, one)[2].isnan()  # where nobody asks
    assert theory.game_value(half, one, theory.optimal_logit(half, one)) == pytest.approx(theory.game_value(half, one))
    with pytest.raises(ValueError, match="logits are NaN where there is mass"):
        theory.game_value(half, one, torch.tensor([math.nan, 0.0, 0.0]))
    with pytest.raises(TypeError, match="logits must hold floating-point numbers"):
        theory.game_value(half, one, torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="one shape"):
        theory.game_value(half, one, torch.zeros(2))
    for function in (theory.optimal_discriminator, theory.optimal_logit):
        with pytest.raises(ValueError, match="p must not be negative"):
            function(-half, half)


def test_slopes_of_the_generators():
    d = torch.tensor([-10.0, -1.0, 0.0, 3.0], dtype=torch.float64)
    closed = {
        "minimax": -d.sigmoid(),
        "non_saturating": -(-d).sigmoid(),
        "maximum_likelihood": -0.5 * d.exp(),
        "least_squares": d - 1.0,
        "wasserstein": -torch.ones_like(d),
        "hinge": -torch.ones_like(d),
    }
    from gankern.losses import LOSSES

    assert closed.keys() == LOSSES.keys()
    for loss, slopes in closed.items():
        with torch.no_grad():  # as figures are often made
            found = theory.generator_slopes(loss, d)
        torch.testing.assert_close(found, slopes, rtol=1e-12, atol=0)
    first = {loss: -slopes[0].item() for loss, slopes in closed.items()}
    assert first["minimax"] == pytest.approx(4.5e-5, rel=0.01)
    assert first["non_saturating"] == pytest.approx(0.99995, abs=5e-6)
    assert first["maximum_likelihood"] == pytest.approx(2.3e-5, rel=0.02)
    with pytest.raises(ValueError, match="minimax"):
        theory.generator_slopes("minimx", d)
    with pytest.raises(TypeError, match="logits"):
        theory.generator_slopes("minimax", torch.tensor([1]))


# ---------------------------------------------------------------------------------------------------- transport


def line(number, seed):
    random = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, number, generator=random, dtype=torch.float64)
    return torch.randn(number, generator=random, dtype=torch.float64), p / p.sum(), q / q.sum()


@pytest.mark.parametrize("seed", range(5))
def test_plans_on_the_line(seed):
    """A linear programme of Euclidean costs on the line is the area between the distribution functions."""
    x, p, q = line(12, seed)
    cost = (x[:, None] - x).abs()
    best = theory.optimal_plan(cost, p, q)
    assert best.cost == pytest.approx(theory.wasserstein_by_cdf(x, p, q), abs=1e-10)
    assert theory.plan_cost(best.plan, cost) == pytest.approx(best.cost, abs=1e-12)
    greedy = theory.greedy_plan(cost, p, q)
    for plan in (best.plan, greedy, p[:, None] * q):
        torch.testing.assert_close(plan.sum(1), p, rtol=0, atol=1e-9)
        torch.testing.assert_close(plan.sum(0), q, rtol=0, atol=1e-9)
        assert theory.plan_cost(plan, cost) >= best.cost - 1e-12
    # The proof: potentials below the costs, tight where mass moves, worth what the plan costs.
    f, g = best.source_potential, best.target_potential
    assert ((f[:, None] + g) <= cost + 1e-9).all()
    assert ((cost - f[:, None] - g) * best.plan).sum() == pytest.approx(0.0, abs=1e-9)
    assert (f @ p + g @ q).item() == pytest.approx(best.cost, abs=1e-9)


def test_plans_in_the_plane_agree_with_the_metric():
    from gankern.metrics import earth_movers_distance

    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 2, generator=random).double(), torch.randn(13, 2, generator=random).double()
    found = theory.optimal_plan(torch.cdist(a, b), torch.full((9,), 1 / 9), torch.full((13,), 1 / 13))
    assert found.plan.shape == (9, 13)
    assert found.cost == pytest.approx(earth_movers_distance(a, b), rel=1e-6)


def test_greedy_is_not_best():
    cost, half = torch.tensor([[0.0, 1.0], [1.0, 3.0]]), torch.tensor([0.5, 0.5])
    assert theory.plan_cost(theory.greedy_plan(cost, half, half), cost) == 1.5
    assert theory.optimal_plan(cost, half, half).cost == 1.0


def test_two_places_that_are_one():
    x = torch.tensor([1.0, 0.0, 1.0])
    assert theory.wasserstein_by_cdf(x, torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])) == 0.0
    assert theory.wasserstein_by_cdf(x, torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])) == 1.0
    assert theory.wasserstein_by_cdf(torch.zeros(1), torch.ones(1), torch.ones(1)) == 0.0


def test_bad_plans():
    half = torch.tensor([0.5, 0.5])
    for function in (theory.optimal_plan, theory.greedy_plan):
        with pytest.raises(ValueError, match=r"cost must be \[2, 2\]"):
            function(torch.zeros(2, 3), half, half)
        with pytest.raises(ValueError, match="q must have the mass 1"):
            function(torch.zeros(2, 2), half, 2 * half)
        with pytest.raises(TypeError, match="cost must be a tensor"):
            function([[0.0]], half, half)
    with pytest.raises(ValueError, match="one shape"):
        theory.plan_cost(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one shape"):
        theory.wasserstein_by_cdf(torch.zeros(3), half, half)


# -------------------------------------------------------------------------------------------------------- games


def test_who_moves_last_matters():
    p = torch.tensor([0.5, 0.5])
    js = 0.75 * math.log(4.0 / 3.0)
    assert js == pytest.approx(0.2158, abs=5e-5)
    assert theory.min_max(p, torch.eye(2)) == pytest.approx(2 * js - LOG4, abs=1e-12)
    assert theory.min_max(p, torch.eye(2)) == pytest.approx(-0.9548, abs=5e-5)
    assert theory.max_min(p, torch.eye(2)) == pytest.approx(-LOG4, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_max_min_is_what_a_discriminator_can_guarantee(seed):
    """Against the minimum over D found by gradient ascent on the worst of G's answers."""
    random = torch.Generator().manual_seed(seed)
    p, choices = torch.rand(5, generator=random).double(), torch.rand(3, 5, generator=random).double() ** 4
    p, choices = p / p.sum(), choices / choices.sum(1, keepdim=True)
    value = theory.max_min(p, choices)
    assert value <= theory.min_max(p, choices) + 1e-12
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], 0.02)
    best = -math.inf
    for step in range(3000):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / 3000)
        values = p @ torch.nn.functional.logsigmoid(logits) + choices @ torch.nn.functional.logsigmoid(-logits)
        best = max(best, values.min().item())
        optimiser.zero_grad()
        (-values.min()).backward()
        optimiser.step()
    assert best <= value + 1e-9 and best == pytest.approx(value, abs=2e-3)


def test_only_one_choice():
    p, q = torch.tensor([0.3, 0.7]), torch.tensor([[0.6, 0.4]])
    assert theory.max_min(p, q) == pytest.approx(theory.min_max(p, q), abs=1e-7)
    with pytest.raises(ValueError, match="each row of choices"):
        theory.min_max(p, torch.ones(1, 2))
    with pytest.raises(ValueError, match="one shape"):
        theory.max_min(p, torch.eye(3))


@pytest.mark.parametrize("eta", [0.05, 0.3, 0.9])
def test_the_bilinear_game(eta):
    radius = {rule: theory.bilinear_path(rule, eta=eta, steps=60).norm(dim=1) for rule in theory.BILINEAR_RULES}
    ratio = radius["simultaneous"][1:] / radius["simultaneous"][:-1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(1 + eta**2)), rtol=1e-12, atol=0)
    ratio = radius["extragradient"][1:] / radius["extragradient"][:-1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(1 - eta**2 + eta**4)), rtol=1e-12, atol=0)
    # x² + y² − η·x·y (of the point before x moves) is what an alternating step keeps.
    x, y = theory.bilinear_path("alternating", eta=eta, steps=500).T
    kept = x * x + y * y - eta * x * y
    torch.testing.assert_close(kept, kept[:1].expand_as(kept), rtol=1e-9, atol=0)
    assert radius["penalty"][-1] < radius["penalty"][0]


def test_the_average_of_a_game_that_goes_around():
    path = theory.bilinear_path("alternating", eta=0.1, steps=5000)
    mean = path.cumsum(0) / torch.arange(1, len(path) + 1)[:, None]
    assert path[-1].norm() > 0.5 and mean[-1].norm() < 0.01


def test_bad_games():
    with pytest.raises(ValueError, match="alternating"):
        theory.bilinear_path("alternate")
    for eta in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="eta must be a positive number"):
            theory.bilinear_path("penalty", eta=eta)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        theory.bilinear_path("penalty", steps=-1)
    assert theory.bilinear_path("penalty", steps=0).shape == (1, 2)


# ---------------------------------------------------------------------------------------------------- Lipschitz


@pytest.mark.parametrize("ratio", [0.9, 0.5])
def test_power_iteration_turns_by_the_square_of_the_ratio(ratio):
    weight = torch.diag(torch.tensor([1.0, ratio], dtype=torch.float64))
    found = theory.power_iteration(weight, 12, start=torch.tensor([1.0, 2.0]))
    expected = 2.0 * ratio ** (2.0 * torch.arange(1, 13, dtype=torch.float64))
    torch.testing.assert_close(found.tangent, expected, rtol=1e-9, atol=0)
    cosine2 = 1.0 / (1.0 + expected**2)
    torch.testing.assert_close(found.sigma, (cosine2 + ratio**2 * (1 - cosine2)).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_power_iteration_of_any_matrix(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = theory.power_iteration(weight, 60, seed=1)
    exact = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(found.singular_values, exact, rtol=1e-12, atol=0)
    assert found.sigma[-1].item() == pytest.approx(exact[0].item(), rel=1e-9)
    assert (found.sigma <= exact[0] * (1 + 1e-12)).all()
    fall = found.tangent[1:] / found.tangent[:-1]
    assert (fall[:20] <= (exact[1] / exact[0]) ** 2 + 1e-9).all()
    assert (1 - found.sigma / exact[0] <= 0.5 * found.tangent**2 + 1e-15).all()


def test_bad_weights():
    for weight, word in [(torch.zeros(2, 2), "weight is zero"), (torch.zeros(2), "2 dimensions")]:
        with pytest.raises(ValueError, match=word):
            theory.power_iteration(weight)
    eye = torch.diag(torch.tensor([1.0, 0.0]))
    for start in (torch.zeros(2), torch.ones(3)):
        with pytest.raises(ValueError, match=r"start must be \[2\] and not zero"):
            theory.power_iteration(eye, start=start)
    with pytest.raises(ValueError, match="takes start to zero"):
        theory.power_iteration(eye, start=torch.tensor([0.0, 1.0]))


def test_the_bound_of_a_chain():
    from torch import nn

    chain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        chain[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        chain[2].weight.copy_(torch.tensor([[0.0, 2.0]]))
    assert theory.lipschitz_bound(chain) == pytest.approx(6.0)
    with torch.no_grad():  # as figures are often made
        slope = theory.steepest_slope(chain, torch.randn(500, 2).double() * 5)
    assert slope == pytest.approx(2.0)  # the steep input direction is not the one that the last layer looks at
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4), n_power_iterations=30)
    before = {key: value.clone() for key, value in normed.state_dict().items()}
    assert theory.lipschitz_bound(normed) == pytest.approx(1.0, abs=0.05)
    assert normed.training and all(torch.equal(before[key], value) for key, value in normed.state_dict().items())
    with pytest.raises(TypeError, match="BatchNorm1d"):
        theory.lipschitz_bound(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(ValueError, match="no linear layer"):
        theory.lipschitz_bound(nn.ReLU())
    for bad, word in [(lambda x: x, "one number for each"), (lambda x: 1.0, "one number for each")]:
        with pytest.raises(ValueError, match=word):
            theory.steepest_slope(bad, torch.zeros(3, 2))


# ----------------------------------------------------------------------------------------------------- mixtures

TWO = (torch.tensor([[1.0, 2.0], [-3.0, -5.0]]), torch.stack([torch.diag(torch.tensor([2.0, 0.5])), torch.eye(2)]))


def test_a_mixture_s_density_and_samples():
    mixture = theory.GaussianMixture(*TWO, torch.tensor([0.5, 0.5]))
    from scipy.stats import multivariate_normal

    points = mixture.sample(1000, seed=3)
    exact = sum(0.5 * multivariate_normal(m.numpy(), c.numpy()).pdf(points.numpy()) for m, c in zip(*TWO))
    torch.testing.assert_close(mixture.log_density(points).exp(), torch.from_numpy(exact), rtol=1e-9, atol=0)
    torch.testing.assert_close(points, mixture.sample(1000, seed=3), rtol=0, atol=0)
    torch.testing.assert_close(points.mean(0), torch.tensor([-1.0, -1.5]).double(), rtol=0, atol=0.3)


def test_em_finds_the_mixture_again():
    fitted = theory.fit_mixture(theory.GaussianMixture(*TWO, torch.tensor([0.5, 0.5])).sample(1000), 2)
    torch.testing.assert_close(fitted.means, TWO[0].double().flip(0), rtol=0, atol=0.2)
    torch.testing.assert_close(fitted.covariances, TWO[1].double().flip(0), rtol=0, atol=0.3)
    assert fitted.weights.tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_bad_mixtures():
    means, covariances, weights = *TWO, torch.tensor([0.5, 0.5])
    for arguments, word in [
        ((means, covariances[:1], weights), "are expected, got"),
        ((means, -covariances, weights), "positive definite"),
        ((means, covariances + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), weights), "symmetric"),
        ((means, covariances, 2 * weights), "mass 1"),
    ]:
        with pytest.raises(ValueError, match=word):
            theory.GaussianMixture(*arguments)
    with pytest.raises(ValueError, match=r"points must be \[N, 2\]"):
        theory.GaussianMixture(*TWO, weights).log_density(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="components must be from 1 to 3"):
        theory.fit_mixture(torch.zeros(3, 2), 4)


def test_a_layer_that_comes_twice_in_a_chain_counts_twice():
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 3.0)
    assert theory.lipschitz_bound(torch.nn.Sequential(layer, torch.nn.ReLU(), layer)) == pytest.approx(9.0)
