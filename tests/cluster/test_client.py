"""What the client of the control API prints."""

from __future__ import annotations

from dataclasses import replace

from resplit.cluster.client import describe_status
from resplit.status import ClusterStatus, NodeStatus

STATUS = ClusterStatus("home", "tiny", "", ("embed", "head"), 3, ("hub", "hub"), "initial", 0.5, (), 1, 0, "yes")


def test_a_status_says_what_the_live_plan_does_not_keep() -> None:
    plain = describe_status(STATUS)
    assert plain == "cluster home, model tiny, epoch 3 (initial), 1 sessions, 0 waiting, ready: yes"
    note = "no plan keeps max_utilization: hub is planned to be 97.2% busy, above its 95.0%"
    noted = ClusterStatus(**{**vars(STATUS), "plan_note": note})
    assert describe_status(noted) == f"{plain}\n  {note}"


def test_a_status_names_a_wrong_clock_with_seconds_and_direction() -> None:
    def shown(ahead_s: float) -> str:
        node = NodeStatus("hub", 7, address="[::1]:7001", answers=True, drained=False, clock_ahead_s=ahead_s)
        return describe_status(replace(STATUS, nodes=(node,))).splitlines()[-1]

    assert shown(-6.04).endswith("  its clock is 6.0 s behind the controller's: set it (NTP)")
    assert shown(60).endswith("  its clock is 60.0 s ahead of the controller's: set it (NTP)")
    assert "clock" not in shown(0.5)
