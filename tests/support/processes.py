"""Observe a running cluster from outside, by its logs and control API, and stop, resume or kill its processes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.errors import ResplitError
from resplit.security.identity import CONTROLLER


async def poll_until(condition: Callable[[], bool], timeout_s: float = 90.0, every_s: float = 0.02) -> float:
    """Evaluate a condition in a thread until it holds, and return the seconds that took.

    For states of other processes, which send no event. TimeoutError if it does not hold in time.
    """
    begun_s = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(every_s)
    return time.monotonic() - begun_s


def command_of(process: subprocess.Popen[bytes]) -> list[str]:
    """The command with which a process of a cluster was started."""
    assert isinstance(process.args, list)
    return process.args


def log_lines(cluster: Cluster, event: str, name: str = CONTROLLER) -> list[str]:
    """The lines of a process's log that contain `event`."""
    log = cluster.state / "log" / f"{name}.log"
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if event in line]


def pause(cluster: Cluster, name: str) -> None:
    """Stop a process (SIGSTOP)."""
    cluster.processes[name].send_signal(signal.SIGSTOP)


def resume(cluster: Cluster, name: str) -> None:
    """Let a stopped process continue (SIGCONT)."""
    cluster.processes[name].send_signal(signal.SIGCONT)


def kill(cluster: Cluster, name: str) -> float:
    """Kill a process (SIGKILL) and wait until it has ended. Returns the time of the signal (monotonic clock)."""
    at_s = time.monotonic()
    cluster.processes[name].kill()
    cluster.processes[name].wait()
    return at_s


def ready(client: ControlClient) -> bool:
    """Whether the cluster serves requests now."""
    try:
        return bool(client.status().ready == "yes")
    except ResplitError:
        return False


def answering(client: ControlClient, *names: str) -> bool:
    """Whether all these nodes answer the controller."""
    try:
        seen = {node.node for node in client.status().nodes if node.answers and node.pid}
    except ResplitError:
        return False
    return set(names) <= seen


def lost(client: ControlClient, *names: str) -> bool:
    """Whether the gateway lists all these nodes as lost."""
    return set(names) <= set(client.model().lost)


def settled(client: ControlClient) -> bool:
    """Whether every node that answers holds exactly the live epoch's blocks, and no session."""
    status = client.status()
    wanted: dict[str, list[int]] = {node.node: [] for node in status.nodes}
    for index, name in enumerate(status.placement or []):
        wanted[name].append(index)
    return status.sessions == 0 and all(
        node.sessions == 0 and node.prepared == () and sorted(node.blocks) == wanted[node.node]
        for node in status.nodes
        if node.answers
    )


def run_resplit(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `resplit` with these arguments to its end."""
    command = [sys.executable, "-m", "resplit.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
