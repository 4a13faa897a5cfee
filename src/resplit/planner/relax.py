"""The default solver: Lagrangian prices give a proven bound and starts, descent gives plans (docs/planner.md)."""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.dual import Dual, Resources
from resplit.planner.improve import Descent
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import OPTIMAL_GAP, Outcome
from resplit.planner.paths import IntervalPaths
from resplit.planner.reasons import infeasibility

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """The best placement found and the best bound proven within `budget`; `start` is a placement to begin from, with
    -1 where an atom has no node."""
    paths = IntervalPaths(instance)
    dual = Dual(instance, paths, Resources.of(instance))
    value, first = dual.evaluate(dual.prices)
    if not len(first):
        reason = infeasibility(instance) or "no chain of linked nodes can hold all blocks in order"
        return Outcome(None, float("inf"), reason)
    descent = Descent(instance, 3 * max(abs(value), 1e-9))
    starts = [first] if start is None else [np.where(start < 0, first, start), first]
    best = min((descent.descend(nodes_of, budget) for nodes_of in starts), key=instance.cost)
    for nodes_of in dual.improve([best], budget, instance.cost(best) * (1 - OPTIMAL_GAP / 10)):
        if budget.spent:
            break
        best = min(best, descent.descend(nodes_of, budget), key=instance.cost)
    if instance.cost(best) < float("inf"):
        return Outcome(best, dual.bound)
    if reason := infeasibility(instance):
        return Outcome(None, float("inf"), reason)
    return Outcome(None, dual.bound, "descent from priced paths found no placement that keeps every limit")
