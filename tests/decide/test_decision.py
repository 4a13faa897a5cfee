"""A decision as a value and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from resplit.decide import Alternative, Decision, DecisionOutcome, Measured, RecoveredSessions
from resplit.decide.decision import NodeConditions
from resplit.epochs import Proposal
from resplit.errors import DataError

KEEP = Alternative("keep", ("a", "a"), 2.0, 2.0, horizon_cost=math.inf, violations=("no link from a to b",))
MOVE = Alternative("re-split", ("a", "b"), 1.0, 1.5, net_gain=math.inf, gain_per_request=math.inf, lower_bound=0.9)
DECISION = Decision(
    at_s=5.0,
    action="re-split",
    reason="better",
    chosen=MOVE,
    urgent="no link",
    threshold=0.05,
    uncertainty=0.02,
    alternatives=(KEEP, Alternative("redistribute", None, reason="infeasible"), MOVE),
    nodes=(NodeConditions("a", True, 1e9, 0.1, True), NodeConditions("b", False, 1e9, 0.0, False)),
    rates_rps={"chat": 0.5},
    current=("a", "a"),
    measured=Measured(1.5, 20, ("chat",), 0.1),
    outcome=DecisionOutcome(deployed=4),
    id=7,
)


def test_a_decision_read_from_its_json_equals_the_one_written() -> None:
    assert Decision.from_json(json.loads(json.dumps(DECISION.to_json()))) == DECISION


def test_infinite_numbers_are_null_in_json() -> None:
    plain = DECISION.to_json()
    assert plain["alternatives"][0]["horizon_cost"] is None
    assert plain["chosen"]["net_gain"] is None
    json.dumps(plain, allow_nan=False)


def test_the_keys_of_the_json_are_those_of_the_decision_log() -> None:
    plain = DECISION.to_json()
    assert set(plain) == {
        *("at_s", "action", "reason", "chosen", "urgent", "threshold", "uncertainty", "alternatives", "nodes"),
        *("rates_rps", "current", "measured", "outcome", "note", "seen", "deviations", "id"),
    }
    assert set(plain["nodes"][0]) == {"name", "usable", "memory_bytes", "background_utilization", "trusted"}
    assert set(plain["measured"]) == {"latency_s", "requests", "slo_missed", "error_s"}
    assert plain["outcome"]["deployed"] == 4


SESSIONS = {
    "sessions": 8,
    "noticed_s": 0.1,
    "waited_s": 2.5,
    "restore_s": 0.05,
    "replay_s": 1.2,
    "restored_positions": 480,
    "replayed_positions": 24,
    "cache_bytes": 2_900_000,
}


@pytest.mark.parametrize(
    ("sessions", "expected"), [(SESSIONS, RecoveredSessions(8, 0.1, 2.5, 0.05, 1.2, 480, 24, 2_900_000)), ({}, None)]
)
def test_the_controllers_entry_of_a_recovery_can_be_read(
    sessions: dict[str, Any], expected: RecoveredSessions | None
) -> None:
    outcome = {"deployed": 3, "plan_s": 2.0, "prepare_s": 0.5, "sessions": sessions}
    entry = {"action": "recover", "at_s": 3.0, "reason": "lost gamma", "outcome": outcome, "id": 1}
    decision = Decision.from_json(entry)
    assert decision == Decision(
        3.0, "recover", "lost gamma", outcome=DecisionOutcome(3, None, 2.0, 0.5, expected), id=1
    )


def test_an_entry_of_another_version_is_read_without_the_keys_that_are_unknown_here() -> None:
    assert Decision.from_json({"at_s": 1.0, "action": "keep", "forecast": [1, 2]}) == Decision(1.0, "keep")


@pytest.mark.parametrize(
    ("entry", "place"), [({"action": "keep"}, "at_s"), ({"at_s": 1.0, "action": "keep", "nodes": [{}]}, "nodes.0.name")]
)
def test_an_entry_that_is_not_a_decision_is_refused_with_the_key(entry: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError, match=f"not a decision: {place}"):
        Decision.from_json(entry)


def test_a_decision_becomes_a_proposal_with_its_predicted_latency() -> None:
    assert DECISION.proposal(3) == Proposal(("a", "b"), "re-split", 3, 1.5, 0.9)


def test_the_latency_before_a_move_counts_only_if_the_old_placement_could_serve() -> None:
    assert DECISION.move(6.0).latency_before_s is None
    could_serve = replace(DECISION, alternatives=(replace(KEEP, horizon_cost=9.0), MOVE))
    move = could_serve.move(6.0)
    assert (move.at_s, move.before, move.after, move.action) == (6.0, ("a", "a"), ("a", "b"), "re-split")
    assert (move.latency_before_s, move.error_before_s, move.predicted_before_s) == (1.5, 0.1, 2.0)
    assert replace(could_serve, measured=None).move(6.0).latency_before_s is None
