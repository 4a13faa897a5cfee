"""Foresee: the moves of a policy that knows the scenario, decided beforehand and made at the moment of each change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.config import ClusterConfig
from resplit.decide import Decision, DecisionOutcome, Settings
from resplit.errors import ProposalRefusedError
from resplit.phases import Phase, declared_phase, phases_of, problem_in
from resplit.policies import Policy, Situation
from resplit.scenario import ScenarioConfig
from resplit.types import Problem

__all__ = ["ForeseenMove", "foresee", "move_on_schedule"]

_log = structlog.get_logger(__name__)
_AGAIN_AFTER_S = 0.25


@dataclass(frozen=True)
class ForeseenMove:
    """A move that is to be live `at_s` seconds after the start of the workload.

    `ahead`: it can be prepared before that, because its nodes run in the phase before, too.
    """

    at_s: float
    phase: Phase
    decision: Decision
    ahead: bool


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
            ahead = all(before.nodes[name].up for name in decision.placement)
            moves.append(ForeseenMove(phase.at_s, phase, decision, ahead))
            problem = replace(problem, current=decision.placement)
        before = phase
    return moves


@task(name="move on schedule", cache_policy=NO_CACHE)
def move_on_schedule(client: ControlClient, moves: Sequence[ForeseenMove], start_s: float, until_s: float) -> None:
    """Have each move prepared as soon as the one before is live, and live in time. Times are seconds since 1970.

    A move that is refused, because a loss came between, is proposed again until the next one is due.
    """
    for index, move in enumerate(moves):
        end_s = start_s + moves[index + 1].at_s if index + 1 < len(moves) else until_s
        outcome = _move(client, move, start_s + move.at_s, end_s)
        decision = replace(move.decision, at_s=start_s + move.at_s, outcome=outcome)
        client.log_decision(decision.to_json())


def _move(client: ControlClient, move: ForeseenMove, at_s: float, until_s: float) -> DecisionOutcome:
    refused = "its phase had ended"
    if not move.ahead:
        time.sleep(max(0.0, at_s - time.time()))
    while time.time() < until_s:
        live = client.model()
        if live.placement == move.decision.placement:
            return DecisionOutcome(refused="it is live already")
        try:
            proposal = replace(move.decision.proposal(live.epoch), not_before_s=at_s)
            return DecisionOutcome(deployed=client.propose(proposal).epoch)
        except ProposalRefusedError as error:
            refused = str(error)
            _log.warning("a foreseen move was refused", labels="; ".join(move.phase.labels), reason=refused)
            time.sleep(_AGAIN_AFTER_S)
    return DecisionOutcome(refused=refused)
