"""A plan for as much of the demand as the nodes can carry: a cluster that is asked for too much serves what it can.

Knows only rates; what lacks memory or trust at any rate stays without a plan.
"""

from __future__ import annotations

from dataclasses import replace

from resplit.planner import solve
from resplit.types import Plan, Problem

__all__ = ["solve_partial_demand"]

_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)


def solve_partial_demand(problem: Problem, time_limit_s: float = 10.0) -> tuple[Plan, float]:
    """The plan for the largest of a few shares of all rates that has one, and that share; where none has, the answer
    for the whole demand, and 1. Each solve takes at most `time_limit_s`, those after the first half of it."""
    whole = plan = solve(problem, time_limit_s=time_limit_s)
    for share in _SHARES:
        if share < 1:
            classes = tuple(replace(each, rate_rps=each.rate_rps * share) for each in problem.classes)
            plan = solve(replace(problem, classes=classes), time_limit_s=time_limit_s / 2)
        if plan.placement is not None:
            return plan, share
    return whole, 1.0
