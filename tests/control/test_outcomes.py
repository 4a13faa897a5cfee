"""What a move brought: measured after it, and added to its entry in the decision log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from resplit.control.log import EpochLog
from resplit.control.outcomes import Outcomes, brought
from resplit.decide import Brought
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
    bodies: list[dict[str, Any]] = [
        {"at_s": 1.0, "action": "re-split", "outcome": {"deployed": 1}},
        {"at_s": 2.0, "action": "re-split", "outcome": {"deployed": 2, "plan_s": 0.1}},
        {"at_s": 3.0, "action": "keep", "outcome": None},
    ]
    for body in bodies:
        log.append_decision(body)
    gateway: Any = Records(record(100.0, 0.5))
    await Outcomes(gateway, log).judge(EPOCH, after_s=0.0)
    bodies[1]["outcome"] = {
        "deployed": 2,
        "plan_s": 0.1,
        "brought": {"latency_s": 0.5, "requests": 1, "latency_before_s": None},
    }
    assert [body for _, body in log.decisions()] == bodies
    log.add_outcome(7, {"brought": {}})  # deployed by nobody's decision
    assert [body for _, body in log.decisions()] == bodies
