"""What the client of the control API sends and prints."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import httpx
import pytest

from resplit.cluster.client import ControlClient, describe_status
from resplit.control.api import MoveBody
from resplit.decide import History, PastMove, Settings
from resplit.errors import ResplitError
from resplit.status import ClusterStatus, NodeStatus

STATUS = ClusterStatus("home", "tiny", "", ("embed", "head"), 3, ("hub", "hub"), "initial", 0.5, (), 1, 0, "yes")


def test_a_status_says_what_the_live_plan_does_not_keep() -> None:
    plain = describe_status(STATUS)
    assert plain == "cluster home, model tiny, epoch 3 (initial), 1 sessions, 0 waiting, ready: yes"
    note = "no plan keeps max_utilization: hub is planned to be 97.2% busy, above its 95.0%"
    noted = ClusterStatus(**{**vars(STATUS), "plan_note": note})
    assert describe_status(noted) == f"{plain}\n  {note}"


def test_a_status_names_a_wrong_clock_with_seconds_and_direction() -> None:
    def shown(ahead_s: float, fault: str | None = None) -> str:
        node = NodeStatus(
            "hub", 7, address="[::1]:7001", answers=not fault, drained=False, fault=fault, clock_ahead_s=ahead_s
        )
        return describe_status(replace(STATUS, nodes=(node,))).splitlines()[-1]

    assert shown(-6.04).endswith("  its clock is 6.0 s behind the controller's: set it (NTP)")
    assert shown(60).endswith("  its clock is 60.0 s ahead of the controller's: set it (NTP)")
    assert "clock" not in shown(0.5)
    assert shown(-60, "its clock is wrong").endswith("  LOST: its clock is wrong"), "once is enough"
    assert shown(-3, "it is faulty").endswith(
        "  LOST: it is faulty  its clock is 3.0 s behind the controller's: set it (NTP)"
    )


def test_a_status_says_how_long_a_node_waits_for_its_quota() -> None:
    node = NodeStatus("hub", 7, address="[::1]:7001", answers=True, drained=False, cores=0.25, throttled=0.4)
    assert describe_status(replace(STATUS, nodes=(node,))).endswith("  waits 40% for its quota of 0.25 cores")
    assert "quota" not in describe_status(replace(STATUS, nodes=(replace(node, throttled=0.0),)))


def test_a_status_before_the_first_placement_says_so() -> None:
    assert ", no epoch yet, " in describe_status(replace(STATUS, epoch=0, placement=None, action=None))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(503, json={"error": {"message": "waiting for nodes: shed"}}), "503 waiting for nodes: shed"),
        (httpx.Response(502, text="<html>bad gateway</html>"), "502 <html>bad gateway</html>"),
        (httpx.Response(404, json={"detail": "Not Found"}), '404 {"detail":"Not Found"}'),
    ],
)
def test_a_refusal_is_told_in_the_controllers_words(answer: httpx.Response, said: str) -> None:
    with ControlClient("http://control", "secret") as client:
        client._http = httpx.Client(base_url="http://control", transport=httpx.MockTransport(lambda _: answer))
        with pytest.raises(ResplitError) as refused:
            client.status()
    assert str(refused.value) == f"the controller refused GET /status: {said}"


def test_a_move_away_from_an_overloaded_placement_can_be_told() -> None:
    """Its predicted latency is infinite, and JSON has no infinity."""
    move = PastMove(1.0, "re-split", ("a",), ("b",), None, math.inf)
    bodies: list[bytes] = []

    def handle(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return httpx.Response(200, json={})

    with ControlClient("http://control", "secret") as client:
        client._http = httpx.Client(base_url="http://control", transport=httpx.MockTransport(handle))
        client.add_move(move, Settings())
        client.set_moves(History(move))
    added, replaced = (json.loads(body, parse_constant=_refuse) for body in bodies)
    assert MoveBody.model_validate(added).move == move
    assert replaced["last"] == added["move"]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
