"""Moving one heap onto another: plans, their costs, and the proof that one is best."""

from __future__ import annotations

from typing import Any

import torch

from gankern.theory.figures._figure import Figure, bar, canvas
from gankern.theory.transport import greedy_plan, optimal_plan, plan_cost, wasserstein_by_cdf

X = torch.arange(8, dtype=torch.float64)
P = torch.tensor([4, 1, 0, 4, 2, 1, 0, 0], dtype=torch.float64) / 12
Q = torch.tensor([0, 0, 4, 1, 0, 1, 2, 4], dtype=torch.float64) / 12


def compute() -> dict[str, Any]:
    cost = (X[:, None] - X).abs()
    best = optimal_plan(cost, P, Q)
    plans = {"a bad plan": P[:, None] * Q, "a greedy plan": greedy_plan(cost, P, Q), "the best plan": best.plan}
    bad, greedy, least = (plan_cost(plan, cost) for plan in plans.values())
    # min_j (cost_ij − g_j) is nowhere steeper than the cost, and equals f where p has mass.
    potential = (cost - best.target_potential)[:, Q > 0].min(1).values
    return {
        "bad": bad,
        "greedy": greedy,
        "best": least,
        "by_cdf": wasserstein_by_cdf(X, P, Q),
        "dual": (potential @ (P - Q)).item(),
        "steepest": ((potential[:, None] - potential).abs() / cost.clamp(min=1e-9)).max().item(),
        "error": max(
            max((plan.sum(1) - P).abs().max(), (plan.sum(0) - Q).abs().max()).item() for plan in plans.values()
        ),
        "plans": plans,
        "potential": potential,
        "costs": (bad, greedy, least),
    }


def draw(found: dict[str, Any]) -> Figure:
    figure, axes = canvas(10, 3, columns=4, width_ratios=(1.25, 1, 1, 1))
    first, *others = axes
    first.bar(X - 0.2, P, 0.4, **bar(0), label="p")
    first.bar(X + 0.2, Q, 0.4, **bar(1), label="q")
    top = first.twinx()
    top.plot(X, found["potential"], color="#c14a00", marker="o", markersize=3, label="potential f")
    top.set(yticks=[])
    first.legend(loc="upper left")
    first.set(title="two heaps; f, the best critic (line)", xlabel="place", ylim=(0, 0.5))
    for ax, (name, plan), cost in zip(others, found["plans"].items(), found["costs"]):
        ax.imshow(plan.T, origin="lower", cmap="Greys", vmin=0, vmax=0.25)
        for i, j in plan.nonzero().tolist():
            if plan[i, j] > 0.02:
                shade = "white" if plan[i, j] > 0.13 else "black"
                ax.text(i, j, f"{12 * plan[i, j]:.2g}", ha="center", va="center", fontsize=7, color=shade)
        ax.set(title=f"{name}: cost {cost:.4f}", xlabel="from", ylabel="to")
        ax.grid(False)
    return figure
