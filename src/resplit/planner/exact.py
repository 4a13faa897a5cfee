"""`exact`: as `relax`, but it branches until the gap is closed to rounding. It may take long; the limit still holds."""

from __future__ import annotations

from resplit.planner import relax
from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]

GAP = 1e-6


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """The optimum, where the budget lasts."""
    return relax.solve(instance, budget, start, gap=GAP)
