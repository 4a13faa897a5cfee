"""Plans repeatedly for the same blocks and nodes while their state drifts.

Only the planner's benchmark uses this; the control loop solves each problem from scratch.
"""

from __future__ import annotations

from resplit.planner import SEARCH_SHARE
from resplit.planner.bound.dual import Dual
from resplit.planner.budget import Budget
from resplit.planner.instance import Instance
from resplit.planner.outcome import OPTIMAL_GAP, plan_of
from resplit.planner.preferences import preferred
from resplit.planner.relax import solve_from
from resplit.types import Plan, Problem

__all__ = ["Replanner"]


class Replanner:
    """Solves a problem, then its drifted states from the last plan and the last prices.

    The last prices give a proven bound on the new problem with a single pricing.
    """

    def __init__(self, problem: Problem, time_limit_s: float = 10.0) -> None:
        self._dual: Dual | None = None
        self.plan = self.solve(problem, time_limit_s)

    def solve(self, problem: Problem, time_limit_s: float = 0.05, tolerance: float = 0.0) -> Plan:
        """Plan `problem`, starting from the last plan and prices. Less is reused if its blocks or nodes changed."""
        budget = Budget(time_limit_s)
        instance = Instance.of(problem)
        last = problem.current if self._dual is None else self.plan.placement or problem.current
        fits = last is not None and len(last) == len(problem.blocks)
        start = instance.nodes_of(last) if last is not None and fits else None
        search = budget.part(SEARCH_SHARE) if tolerance > 0 else budget
        outcome, self._dual = solve_from(instance, search, start, OPTIMAL_GAP / 4, self._dual)
        outcome = preferred(instance, outcome, tolerance, budget)
        self.plan = plan_of(instance, outcome, "relax", budget)
        return self.plan
