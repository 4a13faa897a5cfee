"""The interface of policies: what they are asked, what they answer, and how an answer is priced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from resplit.decide import Decision, History, Measured, Ready, Settings
from resplit.decide.orchestrator import node_conditions
from resplit.decide.price import price, price_current
from resplit.decide.state import Placement
from resplit.estimate import Change
from resplit.planner.best_effort import under_higher_ceilings
from resplit.planner.evaluate import evaluate
from resplit.planner.shortlist import solve_shortlisted
from resplit.types import Plan, Problem

__all__ = ["Occasion", "Policy", "Situation", "best_placement", "keep", "move", "utilization"]

Occasion = Literal["tick", "change", "schedule"]


@dataclass(frozen=True)
class Situation:
    """What a policy knows when it is asked at `now_s`.

    `problem` has today's placement as `current`, which must not be None, and fresh estimates of nodes, links and
    demand. `uncertainty` is the relative error of the cost model that posed it. `changes` were detected since the last
    question; they are empty at a tick. `measured` are the requests since the last move, `busy` the shares of time in
    which nodes were busy, background included; nodes of which that is not known are absent. `ready` is what was
    prepared for likely changes. `ahead` is the problem as it is expected over the horizon; None without a forecast.
    """

    now_s: float
    problem: Problem
    settings: Settings
    history: History = field(default_factory=History)
    uncertainty: float = 0.0
    changes: tuple[Change, ...] = ()
    measured: Measured | None = None
    busy: Mapping[str, float] = field(default_factory=dict)
    ready: Ready = field(default_factory=Ready)
    ahead: Problem | None = None


@runtime_checkable
class Policy(Protocol):
    """A policy of one run. It may remember earlier questions; nothing else is kept between two questions.

    `asked` are the occasions at which `decide` is called:

    - "tick": every few seconds;
    - "change": as soon as a change of nodes or links is detected;
    - "schedule": at each change of the scenario, with the problem as it truly is then. The answer is known beforehand,
      so the weights are loaded when the change comes.

    An empty set is a policy that keeps the first placement.
    """

    asked: frozenset[Occasion]

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """What to do now: `action` is "keep", or the decision has the placement that is to be live."""
        ...


def keep(situation: Situation, reason: str) -> Decision:
    """The decision to keep today's placement, priced."""
    problem = situation.problem
    return Decision(
        at_s=situation.now_s,
        action="keep",
        reason=reason,
        chosen=(kept := price_current(problem, situation.settings).keep),
        uncertainty=situation.uncertainty,
        alternatives=(kept,),
        nodes=node_conditions(problem),
        rates_rps={request_class.name: request_class.rate_rps for request_class in problem.classes},
        current=problem.current or (),
        measured=situation.measured,
    )


def move(situation: Situation, placement: Placement | None, reason: str) -> Decision:
    """The decision to have `placement` live, priced; the decision to keep if that is today's placement or None."""
    kept = keep(situation, reason)
    if placement is None or placement == situation.problem.current:
        return kept
    action: Literal["redistribute", "re-split"] = (
        "redistribute" if _cuts(placement) <= _cuts(kept.current) else "re-split"
    )
    current = price_current(situation.problem, situation.settings)
    chosen = price(situation.problem, action, placement, current, situation.settings)
    return replace(kept, action=action, chosen=chosen, alternatives=(*kept.alternatives, chosen))


def best_placement(situation: Situation) -> Placement | None:
    """The placement with the least objective, wherever blocks are today; None if there is none.

    In a cluster of many nodes it is the best over a shortlist (`planner/shortlist.py`).

    Where no placement keeps the ceilings on utilisation, they rise. Among nearly equal placements the one that moves
    fewer bytes is taken.
    """
    settings = situation.settings

    def plan(problem: Problem) -> Plan | None:
        found = solve_shortlisted(
            problem,
            solver=settings.solver,
            time_limit_s=settings.time_limit_s,
            work_limit=settings.work_limit,
            tolerance=settings.tolerance,
        )
        return found if found.placement is not None else None

    best = plan(situation.problem) or under_higher_ceilings(situation.problem, plan)
    return best.placement if best else None


def utilization(situation: Situation) -> dict[str, float]:
    """The share of time in which each node that holds blocks is busy: measured, or predicted where it is not."""
    problem = situation.problem
    assert problem.current is not None
    names = [node.name for node in problem.nodes]
    predicted = dict(zip(names, evaluate(problem, problem.current).utilization.tolist(), strict=True))
    return {name: situation.busy.get(name, predicted[name]) for name in names if name in problem.current}


def _cuts(placement: Placement) -> frozenset[int]:
    return frozenset(b for b in range(1, len(placement)) if placement[b - 1] != placement[b])
