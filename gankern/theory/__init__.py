"""What the losses of GANs mean, computed exactly on densities and samples: small functions, each with its formula.

Densities are tensors of values on a grid of cells of the width (area) ``dx``; probabilities are the case ``dx=1``.
Everything is computed in fp64, in nats. ``gankern theory`` draws the figures of docs/theory.md with these functions,
``gankern play`` records a GAN in the plane while it trains.

>>> import torch
>>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
>>> round(game_value(p, q), 4)  # 2·JS(p, q) − log 4
-0.9548
"""

from gankern.theory.densities import (
    game_value,
    generator_slopes,
    jensen_shannon,
    kullback_leibler,
    optimal_discriminator,
    optimal_logit,
    total_variation,
)
from gankern.theory.games import BILINEAR_RULES, bilinear_path, max_min, min_max
from gankern.theory.lipschitz import PowerIteration, lipschitz_bound, power_iteration, steepest_slope
from gankern.theory.mixtures import GaussianMixture, fit_mixture
from gankern.theory.transport import (
    TransportPlan,
    greedy_plan,
    optimal_plan,
    plan_cost,
    wasserstein_by_cdf,
)

__all__ = [
    "BILINEAR_RULES",
    "GaussianMixture",
    "PowerIteration",
    "TransportPlan",
    "bilinear_path",
    "fit_mixture",
    "game_value",
    "generator_slopes",
    "greedy_plan",
    "jensen_shannon",
    "kullback_leibler",
    "lipschitz_bound",
    "max_min",
    "min_max",
    "optimal_discriminator",
    "optimal_logit",
    "optimal_plan",
    "plan_cost",
    "power_iteration",
    "steepest_slope",
    "total_variation",
    "wasserstein_by_cdf",
]
