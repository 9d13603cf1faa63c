"""Moving mass: the Wasserstein-1 distance by distribution functions, and as a linear programme with its plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gankern.core import extras
from gankern.theory._checks import distribution, numbers, same_shape


def wasserstein_by_cdf(positions: Tensor, p: Tensor, q: Tensor) -> float:
    """W₁(p, q) = ∫|F(x) − G(x)| dx of probabilities on the line, F and G the distribution functions.

    Args:
        positions: [K], in any order; two entries may be one place.
        p, q: [K], the probabilities there, mass 1.

    Returns:
        a distance in the unit of ``positions``.

    Raises:
        TypeError, ValueError: a mass is not 1 (to 1e-5), or the shapes are not [K].

    >>> wasserstein_by_cdf(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    3.0
    """
    name = "wasserstein_by_cdf"
    x, a, b = numbers(name, "positions", positions, 1), distribution(name, "p", p, ndim=1), distribution(name, "q", q)
    same_shape(name, positions=x, p=a, q=b)
    order = x.argsort()
    difference = (a - b)[order].cumsum(0)[:-1]  # F − G between one position and the next
    return (difference.abs() * x[order].diff()).sum().item()


@dataclass(frozen=True)
class TransportPlan:
    """How to move p onto q at the least cost, and the proof that nothing is cheaper.

    ``plan`` [N, M] is what goes from i to j. The potentials [N] and [M] satisfy f_i + g_j ≤ cost_ij, and
    Σ f·p + Σ g·q = ``cost``: no plan can cost less (linear programming duality). Where the cost is a distance,
    x ↦ min_j (cost(x, y_j) − g_j), j over the places with q_j > 0, is the best critic: 1-Lipschitz, and its mean under
    p less that under q is the distance (Kantorovich and Rubinstein).
    """

    plan: Tensor
    cost: float
    source_potential: Tensor
    target_potential: Tensor


def _problem(function: str, cost: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, a, b = (
        numbers(function, "cost", cost, 2),
        distribution(function, "p", p, ndim=1),
        distribution(function, "q", q, ndim=1),
    )
    if c.shape != (len(a), len(b)):
        raise ValueError(
            f"{function}: cost must be [{len(a)}, {len(b)}], for p [{len(a)}] and q [{len(b)}], got {tuple(c.shape)}"
        )
    return c, a, b


def optimal_plan(cost: Tensor, p: Tensor, q: Tensor) -> TransportPlan:
    """The γ of least Σ γ_ij·cost_ij with rows that sum to p and columns that sum to q, by linear programming (SciPy).

    With cost_ij = ‖x_i − y_j‖ the cost is W₁, the earth mover's distance (Arjovsky 2017, arXiv 1701.07875, §2).

    Args:
        cost: [N, M], of one unit of mass from i to j.
        p, q: [N] and [M], probabilities.

    Returns:
        a :class:`TransportPlan`, fp64.

    Raises:
        TypeError, ValueError: a mass is not 1 (to 1e-5), or the shapes do not fit. ImportError: there is no SciPy.
        RuntimeError: the programme was not solved.

    >>> found = optimal_plan(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]), torch.tensor([0.5, 0.5]))
    >>> found.cost, found.plan.tolist()
    (1.5, [[0.5, 0.5]])
    """
    c, a, b = _problem("optimal_plan", cost, p, q)
    optimize = extras.load("scipy.optimize", "optimal_plan")
    sparse = extras.load("scipy.sparse", "optimal_plan")
    n, m = c.shape
    b = b * (a.sum() / b.sum())  # equal to the last bit, or the programme has no solution
    rows = sparse.kron(sparse.eye(n), torch.ones(1, m).numpy())
    columns = sparse.kron(torch.ones(1, n).numpy(), sparse.eye(m))
    solved = optimize.linprog(
        c.flatten().numpy(),
        A_eq=sparse.vstack([rows, columns]).tocsr(),
        b_eq=torch.cat([a, b]).numpy(),
        bounds=(0, None),
        method="highs-ds",
    )
    if solved.status != 0:
        raise RuntimeError(f"optimal_plan: the linear programme was not solved: {solved.message}")
    potentials = torch.from_numpy(solved.eqlin.marginals.copy())
    return TransportPlan(
        torch.from_numpy(solved.x.copy()).view(n, m), float(solved.fun), potentials[:n], potentials[n:]
    )


def greedy_plan(cost: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """A plan [N, M] that again and again moves as much as it can along the cheapest way that is left.

    Each move is the best one can do at that moment, and the sum of them need not be: its cost is at least
    :func:`optimal_plan`'s.

    Args and errors: those of :func:`optimal_plan`.

    >>> cost, half = torch.tensor([[0.0, 1.0], [1.0, 3.0]]), torch.tensor([0.5, 0.5])
    >>> plan_cost(greedy_plan(cost, half, half), cost), optimal_plan(cost, half, half).cost
    (1.5, 1.0)
    """
    c, a, b = _problem("greedy_plan", cost, p, q)
    left, wanted = a.tolist(), (b * (a.sum() / b.sum())).tolist()
    plan = torch.zeros_like(c)
    for index in c.flatten().argsort(stable=True).tolist():
        i, j = divmod(index, c.shape[1])
        moved = min(left[i], wanted[j])
        plan[i, j] = moved
        left[i] -= moved
        wanted[j] -= moved
    return plan


def plan_cost(plan: Tensor, cost: Tensor) -> float:
    """B(γ) = Σ γ_ij·cost_ij, what a plan costs; both [N, M].

    >>> plan_cost(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 2.0]]))
    1.5
    """
    a, c = numbers("plan_cost", "plan", plan, 2), numbers("plan_cost", "cost", cost, 2)
    same_shape("plan_cost", plan=a, cost=c)
    return (a * c).sum().item()
