"""The solver `exact`: the same as `relax`, but it closes the gap to 1e-6. It may take long; the budget still holds."""

from __future__ import annotations

from resplit.planner import relax
from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]

GAP = 1e-6


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """The optimum to a relative gap of 1e-6, if the budget suffices."""
    return relax.solve(instance, budget, start, gap=GAP)
