"""Plans placements: `solve` runs one of the registered solvers, which share one interface."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from resplit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from resplit.planner.instance import Instance, IntArray
    from resplit.types import Plan, Problem

__all__ = ["SOLVERS", "load", "solve"]

# Each module has solve(instance, budget, start) -> Outcome. It is imported only when it is used.
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
SEARCH_SHARE = 0.85  # of the budget for the solver, if preferences are applied afterwards
ALL_SHARE = 0.99  # otherwise; the last step may end late (one pricing takes 0.2 s at 512 nodes)


def load(solver: str = "relax") -> ModuleType:
    """Import the module of a solver.

    The first import on a machine compiles the solver's kernels and caches them on disk. Callers that measure time or
    must react quickly load the solver beforehand. Raises ConfigError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ConfigError("solver", f"{solver!r} is not one of {', '.join(SOLVERS)}")
    return import_module(SOLVERS[solver])


def solve(
    problem: Problem, *, solver: str = "relax", time_limit_s: float = 10.0, work_limit: int | None = None,
    tolerance: float = 0.0, starts: Sequence[tuple[str, ...]] = (),
) -> Plan:  # fmt: skip
    """Plan `problem` with `solver`, within `time_limit_s` seconds or, if it is given, `work_limit` solver steps.

    Among plans whose objective is within `tolerance` (relative) of the best found, one that meets more service
    objectives is preferred, then one that moves fewer bytes. The search starts from the current placement, or
    from a better one of `starts`. Raises ConfigError for an unknown solver.
    """
    module = load(solver)
    from resplit.planner.budget import Budget
    from resplit.planner.instance import Instance
    from resplit.planner.outcome import plan_of
    from resplit.planner.preferences import preferred

    budget = Budget(time_limit_s, work_limit)
    instance = Instance.of(problem)
    start = _best_start(instance, problem.current, starts)
    search = budget.part(SEARCH_SHARE if tolerance > 0 else ALL_SHARE)
    outcome = module.solve(instance, search, start)
    outcome = preferred(instance, outcome, tolerance, budget)
    return plan_of(instance, outcome, solver, budget)


def _best_start(
    instance: Instance, current: tuple[str, ...] | None, starts: Sequence[tuple[str, ...]]
) -> IntArray | None:
    """The placement from which the search starts, as nodes of atoms: the current one, or a legal one that is better."""
    start = None if current is None else instance.nodes_of(current)
    cost = float("inf") if start is None or (start < 0).any() else instance.cost(start)
    for nodes_of in map(instance.nodes_of, starts):
        if (nodes_of >= 0).all() and instance.cost(nodes_of) < cost:
            start, cost = nodes_of, instance.cost(nodes_of)
    return start
