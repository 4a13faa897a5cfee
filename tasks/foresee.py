"""Foresee: have the moves of a policy that knows the scenario prepared in time, and live at each change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import structlog
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.decide import DecisionOutcome
from resplit.errors import ProposalRefusedError
from resplit.policies.foresight import ForeseenMove

__all__ = ["move_on_schedule"]

_log = structlog.get_logger(__name__)
_AGAIN_AFTER_S = 0.25


@task(name="move on schedule", cache_policy=NO_CACHE)
def move_on_schedule(client: ControlClient, moves: Sequence[ForeseenMove], start_s: float, until_s: float) -> None:
    """Have each move prepared as soon as the one before is live, and live in time. Times are seconds since 1970.

    A move that is refused, because a loss came between, is proposed again until the next one is due.
    """
    for index, move in enumerate(moves):
        end_s = start_s + moves[index + 1].at_s if index + 1 < len(moves) else until_s
        outcome = _move(client, move, start_s + move.at_s, end_s)
        decision = replace(move.decision, at_s=start_s + move.at_s, outcome=outcome)
        client.log_decision(decision)


def _move(client: ControlClient, move: ForeseenMove, at_s: float, until_s: float) -> DecisionOutcome:
    refused = "its phase had ended"
    if not move.can_prepare:
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
