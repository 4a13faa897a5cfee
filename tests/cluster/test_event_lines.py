"""`resplit up` tells which nodes are lost, which answer again, and which epochs go live."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from structlog.testing import capture_logs

from resplit.cluster.event_lines import tell
from resplit.errors import NodeLostError
from resplit.status import ClusterStatus, NodeStatus

NODE = NodeStatus(node="hub", pid=1, address="127.0.0.1:7001", answers=True, drained=False)
OTHER = replace(NODE, node="shed")
ALL = ClusterStatus(
    "home", "tiny", "", ("embed", "head"), 1, ("hub", "shed"), "first", None, (NODE, OTHER), 0, 0, "yes"
)
LOST = replace(ALL, nodes=(NODE, replace(OTHER, answers=False, fault="it sends too much")))
MOVED = replace(ALL, epoch=2, action="recover")


def told(*seen: ClusterStatus | Exception) -> list[dict[str, Any]]:
    """The lines of the log after these answers of the controller."""
    answers, stop = list(seen), threading.Event()

    def status() -> ClusterStatus:
        if len(answers) == 1:
            stop.set()
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as lines:
        tell(status, stop, every_s=0)
    return lines


def test_what_changes_is_told_once() -> None:
    assert told(ALL, ALL, LOST, LOST, MOVED, MOVED) == [
        {"event": "a node is lost", "node": "shed", "fault": "it sends too much", "log_level": "warning"},
        {"event": "a node answers again", "node": "shed", "log_level": "info"},
        {"event": "an epoch is live", "epoch": 2, "action": "recover", "log_level": "info"},
    ]


def test_what_changed_while_the_controller_was_away_is_told_too() -> None:
    assert [line["event"] for line in told(LOST, NodeLostError("away"), MOVED)] == [
        "a node is lost",
        "a node answers again",
        "an epoch is live",
    ]
