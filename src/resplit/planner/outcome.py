"""The result that every solver returns, and its conversion to a `Plan`."""

from __future__ import annotations

from dataclasses import dataclass

from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate, moved_bytes, slo_shortfall_s
from resplit.planner.instance import Instance, IntArray
from resplit.types import Plan, Status, segments_of

__all__ = ["Outcome", "plan_of"]

OPTIMAL_GAP = 1e-4
MAX_VIOLATIONS = 5


@dataclass(frozen=True)
class Outcome:
    """The result of a solver.

    `nodes_of` (A,) is the node of each atom, None if no placement was found. A baseline's placement may violate
    constraints. `lower_bound` is proven: -inf if nothing is known, inf if it is proven that no placement exists.
    `others` are further legal placements that the solver found. `reason` says why there is no placement.
    """

    nodes_of: IntArray | None
    lower_bound: float
    reason: str | None = None
    others: tuple[IntArray, ...] = ()


def plan_of(instance: Instance, outcome: Outcome, solver: str, budget: Budget) -> Plan:
    """Convert `outcome` to a plan. Every number of the plan is recomputed from the problem."""
    solve_s = budget.elapsed_s
    if outcome.nodes_of is None:
        status: Status = "infeasible" if outcome.lower_bound == float("inf") else "unknown"
        return Plan(status, solver, solve_s, reason=outcome.reason)
    problem = instance.problem
    placement = instance.placement(outcome.nodes_of)
    evaluation = evaluate(problem, placement)
    if evaluation.violations:
        reason = "the placement found violates " + "; ".join(
            each.text for each in evaluation.violations[:MAX_VIOLATIONS]
        )
        return Plan("unknown", solver, solve_s, reason=reason)
    bound = min(outcome.lower_bound, evaluation.objective)
    bound = bound if bound > 0 else 0.0  # the objective is never negative
    gap = (evaluation.objective - bound) / evaluation.objective if evaluation.objective > 0 else 0.0
    names = [node.name for node in problem.nodes]
    return Plan(
        status="optimal" if gap <= OPTIMAL_GAP else "feasible",
        solver=solver,
        solve_s=solve_s,
        placement=placement,
        segments=segments_of(placement),
        objective=evaluation.objective,
        terms=evaluation.terms,
        lower_bound=bound,
        gap=gap,
        class_latency_s={
            c.name: float(t) for c, t in zip(problem.classes, evaluation.class_latency_s, strict=True)
        },
        utilization=dict(zip(names, evaluation.utilization.tolist(), strict=True)),
        slo_shortfall_s=slo_shortfall_s(problem, evaluation),
        moved_bytes=moved_bytes(problem, placement),
    )  # fmt: skip
