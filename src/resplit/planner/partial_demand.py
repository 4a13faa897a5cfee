"""Plans for the part of the demand that the nodes can serve, if they cannot serve all of it.

Only rates are reduced. A problem that lacks memory or trust has no plan at any rate.
"""

from __future__ import annotations

from dataclasses import replace

from resplit.planner import solve
from resplit.types import Plan, Problem

__all__ = ["solve_partial_demand"]

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)


def solve_partial_demand(problem: Problem, time_limit_s: float = 10.0) -> tuple[Plan, float]:
    """Plan for the largest share of the demand, out of a fixed list, that has a plan.

    Returns the plan and the share (0 to 1) of all rates that it is for. If no share has a plan, returns the answer for
    the whole demand and 1. The first solve takes at most `time_limit_s` seconds, each further one half of it.
    """
    whole = plan = solve(problem, time_limit_s=time_limit_s)
    for share in SHARES:
        if share < 1:
            classes = tuple(replace(each, rate_rps=each.rate_rps * share) for each in problem.classes)
            plan = solve(replace(problem, classes=classes), time_limit_s=time_limit_s / 2)
        if plan.placement is not None:
            return plan, share
    return whole, 1.0
