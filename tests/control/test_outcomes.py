"""What a move brought: measured after it, and added to its entry in the decision log."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from resplit.control.log import EpochLog
from resplit.control.outcomes import Outcomes, brought
from resplit.decide import Brought, Decision, DecisionOutcome
from resplit.epochs import LiveEpoch
from resplit.session_records import SessionRecord

EPOCH = LiveEpoch(2, 100.0, "re-split", ("a",), 1.0, None, 0.0, 0.0)


def record(arrival_s: float, latency_s: float, status: int = 200) -> SessionRecord:
    end_s = arrival_s + latency_s if status == 200 else math.nan
    return SessionRecord("chat", arrival_s, arrival_s, end_s, 8, 8, status, (1,), (), True, ())


class Records:
    """The records that a gateway has."""

    def __init__(self, *records: SessionRecord) -> None:
        self._records = list(records)

    def records(self, skip: int) -> list[SessionRecord]:
        return self._records[skip:]


def test_requests_before_and_after_the_move_are_compared() -> None:
    before = [record(70.0, 50.0), record(85.0, 3.0), record(95.0, 1.0)]  # the first one is too old
    after = [record(100.0, 0.5), record(110.0, 0.25), record(111.0, 9.0, status=429)]
    assert brought([*before, *after], EPOCH) == Brought(0.375, 2, 2.0)
    assert brought(after, EPOCH) == Brought(0.375, 2, None)
    assert brought(before, EPOCH) is None


async def test_the_decision_that_deployed_the_epoch_gets_it(tmp_path: Path) -> None:
    log = EpochLog(tmp_path / "epochs.db")
    for decision in (
        Decision(1.0, "re-split", outcome=DecisionOutcome(deployed=1)),
        Decision(2.0, "re-split", outcome=DecisionOutcome(deployed=2, plan_s=0.1)),
        Decision(3.0, "keep"),
    ):
        log.append_decision(decision)
    first, second, third = log.decisions()
    gateway: Any = Records(record(100.0, 0.5))
    await Outcomes(gateway, log).judge(EPOCH, after_s=0.0)
    outcome = DecisionOutcome(deployed=2, plan_s=0.1, brought=Brought(0.5, 1, None))
    judged = [first, replace(second, outcome=outcome), third]
    assert log.decisions() == judged
    log.add_brought(7, Brought(0.5, 1))  # deployed by nobody's decision
    assert log.decisions() == judged


async def test_of_two_decisions_that_name_an_epoch_the_newer_one_gets_it(tmp_path: Path) -> None:
    log = EpochLog(tmp_path / "epochs.db")  # a log restored from a backup gives numbers a second time
    for at_s in (1.0, 2.0):
        log.append_decision(Decision(at_s, "re-split", outcome=DecisionOutcome(deployed=2)))
    log.add_brought(2, Brought(0.5, 1))
    older, newer = (decision.outcome for decision in log.decisions())
    assert (older, newer) == (DecisionOutcome(deployed=2), DecisionOutcome(deployed=2, brought=Brought(0.5, 1)))
