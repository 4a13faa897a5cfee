"""Looks at a running cluster from outside, by its log and its control API; breaks and mends its processes."""

from __future__ import annotations

import signal
import time

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.errors import ResplitError
from resplit.security.identity import CONTROLLER


def said(cluster: Cluster, event: str, name: str = CONTROLLER) -> list[str]:
    """The lines of a member's log, since it was started, that speak of `event`."""
    log = cluster.state / "log" / f"{name}.log"
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if event in line]


def pause(cluster: Cluster, name: str) -> None:
    """Stop a process where it is (SIGSTOP)."""
    cluster.processes[name].send_signal(signal.SIGSTOP)


def wake(cluster: Cluster, name: str) -> None:
    """Let a stopped process go on (SIGCONT)."""
    cluster.processes[name].send_signal(signal.SIGCONT)


def kill(cluster: Cluster, name: str) -> float:
    """End a process at once (SIGKILL) and wait for that; the moment it was sent (monotonic clock)."""
    at_s = time.monotonic()
    cluster.processes[name].kill()
    cluster.processes[name].wait()
    return at_s


def ready(client: ControlClient) -> bool:
    """Whether requests are served now."""
    try:
        return bool(client.status()["ready"] == "yes")
    except ResplitError:
        return False


def answers(client: ControlClient, *names: str) -> bool:
    """Whether all these nodes are known and answer."""
    try:
        seen = {node["node"] for node in client.status()["nodes"] if node["answers"]}
    except ResplitError:
        return False
    return set(names) <= seen


def lost(client: ControlClient, *names: str) -> bool:
    """Whether the gateway takes all these nodes for lost."""
    return set(names) <= set(client.model()["lost"])


def settled(client: ControlClient) -> bool:
    """Whether no node holds a session, or a block that the live epoch does not want there."""
    status = client.status()
    wanted = {name: [] for name in (node["node"] for node in status["nodes"])}
    for index, name in enumerate(status["placement"] or []):
        wanted[name].append(index)
    return status["sessions"] == 0 and all(
        node.get("sessions") == 0
        and node.get("prepared") == []
        and sorted(node.get("blocks", [])) == wanted[node["node"]]
        for node in status["nodes"]
        if node["answers"]
    )
