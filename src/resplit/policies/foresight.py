"""The moves of a policy that knows the scenario: one decision for each phase, made before the run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from resplit.config import ClusterConfig
from resplit.decide import Decision, Settings
from resplit.phases import Phase, declared_phase, phases_of, problem_in
from resplit.policies.base import Policy, Situation
from resplit.scenario import ScenarioConfig
from resplit.types import Problem

__all__ = ["ForeseenMove", "foresee"]


@dataclass(frozen=True)
class ForeseenMove:
    """A move that is to be live `at_s` seconds after the start of the workload.

    `can_prepare`: it can be prepared before that, because its nodes run in the phase before, too.
    """

    at_s: float
    phase: Phase
    decision: Decision
    can_prepare: bool


def foresee(
    problem: Problem, cluster: ClusterConfig, scenario: ScenarioConfig, policy: Policy, settings: Settings
) -> list[ForeseenMove]:
    """The moves of `policy` at the changes of a scenario. `problem` was posed before any of them, with a placement.

    Each phase is decided on as it truly is, from the placement of the phase before.
    """
    declared, moves, rng = declared_phase(cluster, scenario), [], np.random.default_rng(0)
    before = declared
    for phase in phases_of(cluster, scenario):
        posed = problem_in(problem, phase, declared)
        decision = policy.decide(Situation(phase.at_s, posed, settings), rng)
        if decision.action != "keep":
            can_prepare = all(before.nodes[name].up for name in decision.placement)
            moves.append(ForeseenMove(phase.at_s, phase, decision, can_prepare))
            problem = replace(problem, current=decision.placement)
        before = phase
    return moves
