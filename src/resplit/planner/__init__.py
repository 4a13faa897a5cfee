"""Placement planning: one function, `solve`, over a registry of solvers that share one interface."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from resplit.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from resplit.types import Plan, Problem

__all__ = ["SOLVERS", "load", "solve"]

# Each is a module with solve(instance, budget, start) -> Outcome, imported when it is asked for.
SOLVERS = {
    "relax": "resplit.planner.relax",
    "exact": "resplit.planner.exact",
    "uniform": "resplit.planner.baselines.uniform",
    "memory": "resplit.planner.baselines.memory",
    "latency-dp": "resplit.planner.baselines.latency_dp",
    "bottleneck-dp": "resplit.planner.baselines.bottleneck_dp",
    "swarm": "resplit.planner.baselines.swarm",
    "water-fill": "resplit.planner.baselines.water_fill",
    "greedy": "resplit.planner.baselines.greedy",
}
SEARCH_SHARE = 0.85  # of the budget, for the solver itself, where its answer is then bent to preferences
ALL_SHARE = 0.99  # else; a last step may end late: one pricing takes 0.2 s at 512 nodes


def load(solver: str = "relax") -> ModuleType:
    """The module of a solver, imported now: before a clock starts, or before a loss makes every second count.

    Its kernels are compiled at the first import on a machine, and kept on disk. ConfigError for a solver that does not
    exist.
    """
    if solver not in SOLVERS:
        raise ConfigError("solver", f"{solver!r} is none of {', '.join(SOLVERS)}")
    return import_module(SOLVERS[solver])


def solve(
    problem: Problem, *, solver: str = "relax", time_limit_s: float = 10.0, work_limit: int | None = None,
    tolerance: float = 0.0,
) -> Plan:  # fmt: skip
    """The plan that `solver` finds for `problem` within `time_limit_s` seconds, or `work_limit` steps instead.

    Within `tolerance` (relative) of the best, a plan that meets more service objectives and then moves fewer bytes
    is preferred. Raises ConfigError for a solver that does not exist.
    """
    module = load(solver)
    from resplit.planner.budget import Budget
    from resplit.planner.instance import Instance
    from resplit.planner.outcome import plan_of
    from resplit.planner.preferences import preferred

    budget = Budget(time_limit_s, work_limit)
    instance = Instance.of(problem)
    start = instance.nodes_of(problem.current) if problem.current is not None else None
    search = budget.part(SEARCH_SHARE if tolerance > 0 else ALL_SHARE)
    outcome = module.solve(instance, search, start)
    outcome = preferred(instance, outcome, tolerance, budget)
    return plan_of(instance, outcome, solver, budget)
