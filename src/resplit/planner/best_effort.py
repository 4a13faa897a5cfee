"""Plans for a cluster that cannot serve the whole demand within its ceilings on utilisation.

A busy node is slow, not forbidden: first the ceilings rise, then the demand is planned for in part. Memory, trust and
links always hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from resplit.planner import solve
from resplit.types import Node, Plan, Problem

__all__ = ["BestEffortPlan", "ceilings_note", "solve_best_effort", "under_higher_ceilings"]

DEMAND_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)
# Of what others leave of a node, the part that resplit may use where the ceilings leave no plan; the least first.
OWN_SHARES = (0.5, 0.75, 0.9)
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class BestEffortPlan:
    """A plan for the part `demand_share` (0 to 1) of all rates.

    `note` says in one line what it does not keep; it is "" if it serves the whole demand within all ceilings.
    """

    plan: Plan
    demand_share: float = 1.0
    note: str = ""


def solve_best_effort(problem: Problem, time_limit_s: float = 10.0, work_limit: int | None = None) -> BestEffortPlan:
    """Plan for the largest share of the demand, out of a fixed list, that has a plan under some ceilings.

    For each share the problem's own ceilings come first, then higher ones, as low as possible. If no share has a plan,
    the answer says what more use of the nodes does not mend, if that is known. The first solve takes at most
    `time_limit_s` seconds, each further one half of it; or `work_limit` solver steps each, if it is given.
    """
    whole = solve(problem, time_limit_s=time_limit_s, work_limit=work_limit)
    if whole.placement is not None:
        return BestEffortPlan(whole)

    def answer_to(posed: Problem) -> Plan:
        return solve(posed, time_limit_s=time_limit_s / 2, work_limit=work_limit)

    def plan_of(posed: Problem) -> Plan | None:
        plan = answer_to(posed)
        return plan if plan.placement is not None else None

    easiest = answer_to(_with_ceilings(_part(problem, DEMAND_SHARES[-1]), OWN_SHARES[-1]))
    if easiest.placement is None:
        return BestEffortPlan(easiest if easiest.status == "infeasible" else whole)
    for share in DEMAND_SHARES:
        part = _part(problem, share)
        plan = (plan_of(part) if share < 1 else None) or under_higher_ceilings(part, plan_of)
        if plan is not None:
            for_part = f"the plan is for {share:.0%} of the demand" if share < 1 else ""
            note = "; ".join(filter(None, [ceilings_note(part, plan.utilization), for_part]))
            return BestEffortPlan(plan, share, note)
    return BestEffortPlan(whole)


def under_higher_ceilings(problem: Problem, attempt: Callable[[Problem], _Found | None]) -> _Found | None:
    """What `attempt` finds under the lowest of the higher ceilings with which it finds something.

    The highest are tried first, because often nothing is found under any. None too if no ceiling rises.
    """
    raised = [_with_ceilings(problem, own_share) for own_share in OWN_SHARES]
    raised = [posed for posed in raised if posed.nodes != problem.nodes]
    last = attempt(raised[-1]) if raised else None
    if last is None:
        return None
    return next((found for posed in raised[:-1] if (found := attempt(posed)) is not None), last)


def ceilings_note(problem: Problem, utilization: Mapping[str, float]) -> str:
    """One line about the nodes that a plan uses above the ceilings of `problem`; "" if there are none.

    `utilization` is that of the plan, by node.
    """
    nodes = ", ".join(
        f"{node.name} is planned to be {utilization[node.name]:.1%} busy, above its {node.max_utilization:.1%}"
        for node in problem.nodes
        if node.background_utilization < utilization[node.name] > node.max_utilization
    )
    return f"no plan keeps max_utilization: {nodes}" if nodes else ""


def _with_ceilings(problem: Problem, own_share: float) -> Problem:
    """The problem in which resplit may use at least `own_share` of what others leave of each node."""
    return replace(problem, nodes=tuple(replace(n, max_utilization=_raised(n, own_share)) for n in problem.nodes))


def _raised(node: Node, own_share: float) -> float:
    background = node.background_utilization
    return max(node.max_utilization, background + own_share * (1 - background))


def _part(problem: Problem, share: float) -> Problem:
    return replace(problem, classes=tuple(replace(c, rate_rps=share * c.rate_rps) for c in problem.classes))
