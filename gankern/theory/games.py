"""Two players: who moves last matters, and steps along the gradient need not arrive anywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gankern.core import extras
from gankern.core.arguments import real, whole
from gankern.core.names import look_up
from gankern.theory._checks import distribution, numbers, same_shape
from gankern.theory.densities import game_value, jensen_shannon


def _strategies(function: str, p: Tensor, choices: Tensor) -> tuple[Tensor, list[Tensor]]:
    data, rows = distribution(function, "p", p, ndim=1), numbers(function, "choices", choices, 2)
    for row in rows:
        same_shape(function, p=data, **{"each row of choices": row})
    return data, [distribution(function, "each row of choices", row) for row in rows]


def min_max(p: Tensor, choices: Tensor) -> float:
    """min_G max_D V(D, G), G choosing one of the distributions ``choices`` [S, K], D then knowing which.

    V(D, q) = E_p log D + E_q log(1 − D), so the inner maximum is 2·JS(p, q) − log 4.

    Args:
        p: [K], the probabilities of K points in the data.
        choices: [S, K], a row for each distribution that G can make.

    Raises:
        TypeError, ValueError: a mass is not 1 (to 1e-5), or the shapes do not fit.

    >>> round(min_max(torch.tensor([0.5, 0.5]), torch.eye(2)), 4)  # two images, G makes one of them
    -0.9548
    """
    data, rows = _strategies("min_max", p, choices)
    return min(game_value(data, row) for row in rows)


def max_min(p: Tensor, choices: Tensor) -> float:
    """max_D min_G V(D, G), D moving first: never more than :func:`min_max`.

    V is concave in D and linear in G's distribution, so G may as well mix its choices (von Neumann), and the value is
    2·JS(p, q) − log 4 of the mixture q nearest to p. Against a G that answers each D, D can only say ½ where it can be
    answered everywhere: the value −log 4.

    Args and errors: those of :func:`min_max`. ImportError: there is no SciPy.

    >>> round(max_min(torch.tensor([0.5, 0.5]), torch.eye(2)), 4)  # −log 4
    -1.3863
    """
    data, rows = _strategies("max_min", p, choices)
    optimize = extras.load("scipy.optimize", "max_min")
    table = torch.stack(rows)

    def of_weights(weights: object) -> float:  # convex on the simplex
        w = torch.as_tensor(weights, dtype=torch.float64).clamp(min=0.0)
        mixture = (w / w.sum()) @ table
        return jensen_shannon(data, mixture / mixture.sum())

    number = len(rows)
    start = torch.full((number,), 1.0 / number, dtype=torch.float64).numpy()
    solved = optimize.minimize(
        of_weights,
        start,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * number,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    least = min([float(solved.fun), of_weights(start), *(jensen_shannon(data, row) for row in rows)])
    return 2.0 * least - math.log(4.0)


# x descends on x·y, y ascends: how a player's step is computed from where both are, with the step size η.
def _simultaneous(x: float, y: float, eta: float) -> tuple[float, float]:
    return x - eta * y, y + eta * x


def _alternating(x: float, y: float, eta: float) -> tuple[float, float]:
    x = x - eta * y
    return x, y + eta * x


def _extragradient(x: float, y: float, eta: float) -> tuple[float, float]:
    ahead_x, ahead_y = _simultaneous(x, y, eta)
    return x - eta * ahead_y, y + eta * ahead_x


def _penalised(x: float, y: float, eta: float) -> tuple[float, float]:
    """The payoff is linear in the critic y, D(x) = y·x, whose penalty ½·‖∂D/∂x‖² = ½·y² it pays."""
    return x - eta * y, y + eta * (x - y)


BILINEAR_RULES = {
    "simultaneous": _simultaneous,
    "alternating": _alternating,
    "extragradient": _extragradient,
    "penalty": _penalised,
}


def bilinear_path(rule: str, *, eta: float = 0.1, steps: int = 200, start: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """The path of (x, y) in the game min_x max_y x·y, whose solution is (0, 0).

    Each step of "simultaneous" multiplies the radius by sqrt(1 + η²); "alternating" stays on a closed curve (for
    η < 2); "extragradient" (a step computed from where the plain step would lead, Korpelevich 1976) multiplies it by
    sqrt(1 − η² + η⁴); "penalty" has the critic y pay ½·y², a zero-centred gradient penalty (Mescheder 2018, arXiv
    1801.04406), and spirals in (for η < 1).

    Args:
        rule: a name in ``BILINEAR_RULES``.
        eta: the step size, positive.
        steps: how many.
        start: (x, y).

    Returns:
        [steps + 1, 2], fp64, the start first. Its running mean is "averaging": it goes to 0 as the path goes around.

    Raises:
        ValueError, TypeError: there is no such rule, eta is not positive, or steps is not a whole number.

    >>> path = bilinear_path("simultaneous", eta=0.5, steps=1)
    >>> (path[1].norm() / path[0].norm()).item() == (1 + 0.5**2) ** 0.5
    True
    """
    move = look_up(BILINEAR_RULES, rule, "rule")
    if not (real("bilinear_path: eta", eta) > 0 and math.isfinite(eta)):
        raise ValueError(f"bilinear_path: eta must be a positive number, got {eta}")
    path = [(float(start[0]), float(start[1]))]
    for _ in range(whole("bilinear_path: steps", steps, least=0)):
        path.append(move(*path[-1], eta))
    return torch.tensor(path, dtype=torch.float64)
