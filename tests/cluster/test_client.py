"""What the client of the control API prints."""

from __future__ import annotations

from resplit.cluster.client import describe_status
from resplit.status import ClusterStatus

STATUS = ClusterStatus("home", "tiny", "", ("embed", "head"), 3, ("hub", "hub"), "initial", 0.5, (), 1, 0, "yes")


def test_a_status_says_what_the_live_plan_does_not_keep() -> None:
    plain = describe_status(STATUS)
    assert plain == "cluster home, model tiny, epoch 3 (initial), 1 sessions, 0 waiting, ready: yes"
    note = "no plan keeps max_utilization: hub is planned to be 97.2% busy, above its 95.0%"
    noted = ClusterStatus(**{**vars(STATUS), "plan_note": note})
    assert describe_status(noted) == f"{plain}\n  {note}"
