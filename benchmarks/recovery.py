"""How long a stream pauses when the node with most blocks is killed, by the length of the stream's history.

Runs on the emulated home cluster, with replicas of caches and without. Prints a table like the one in docs/recovery.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

import httpx
import yaml

from benchmarks.serving.clusters import MODEL
from benchmarks.serving.load import token_times_s
from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import first_plan
from resplit.cluster.local import Cluster, running, start_process
from tests.support.processes import answering, poll_until

PROMPT = [5, 17, 40, 200, 31, 8, 99, 7]
AFTER_TOKENS = 6  # generated after the recovery
COLUMNS = (
    "copy every", "history", "longest gap, s", "noticed", "plan", "load", "restore", "replay", "restored", "replayed",
    "MB transferred", "s per token", "KB copied per token",
)  # fmt: skip


async def stream(url: str, new_tokens: int, times_s: list[float]) -> None:
    """Stream one request. Appends the moment of each token (monotonic clock) to `times_s`."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        async for at_s in token_times_s(client, PROMPT, new_tokens):
            times_s.append(at_s)  # noqa: PERF401 - read while it grows


@dataclass(frozen=True)
class Recovered:
    """A recovery from a node's death after `history` positions, in the order of `COLUMNS`."""

    history: int
    longest_gap_s: float
    noticed_s: float
    plan_s: float | None
    load_s: float | None
    restore_s: float
    replay_s: float
    restored_positions: int
    replayed_positions: int
    transferred_mb: float
    token_s: float
    copied_kb_per_token: float


async def recover(cluster: Cluster, client: ControlClient, history: int) -> Recovered:
    """Kill the node that hosts most blocks once a stream has `history` positions."""
    victim = Counter(client.model().placement).most_common(1)[0][0]
    times_s: list[float] = []
    streaming = asyncio.create_task(stream(cluster.url, history - len(PROMPT) + AFTER_TOKENS, times_s))
    await poll_until(lambda: len(times_s) + len(PROMPT) >= history or streaming.done(), timeout_s=600.0)
    killed_s = time.monotonic()
    os.kill(cluster.processes[victim].pid, signal.SIGKILL)
    await streaming
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    around = [gap for gap, end in zip(gaps_s, times_s[1:], strict=True) if end > killed_s]
    before = [gap for gap, end in zip(gaps_s, times_s[1:], strict=True) if end <= killed_s]
    record = client.records()[-1]
    (move,) = [move for move in record.moves if move.recovery]
    outcome = [decision.outcome for decision in client.decisions() if decision.action == "recover"][-1]
    start_process(cluster, victim)
    await poll_until(lambda: answering(client, victim), timeout_s=120.0)
    recovery = move.recovery
    assert recovery is not None
    assert outcome is not None
    return Recovered(
        history=history,
        longest_gap_s=max(around),
        noticed_s=recovery.noticed_s,
        plan_s=outcome.plan_s,
        load_s=outcome.prepare_s,
        restore_s=recovery.restore_s,
        replay_s=recovery.replay_s,
        restored_positions=recovery.restored_positions,
        replayed_positions=recovery.replayed_positions,
        transferred_mb=move.cache_bytes / 1e6,
        token_s=statistics.median(before),
        copied_kb_per_token=record.copied_bytes / (record.prompt_tokens + record.new_tokens) / 1e3,
    )


def measure(cluster_file: Path, state: Path, copy_every: int, histories: list[int]) -> list[Recovered]:
    """Start a cluster, and measure a recovery for each history."""
    content = yaml.safe_load(cluster_file.read_text())
    content["limits"] |= {"copy_every": copy_every, "drafts": 0, "deadline": "600 s"}
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "cluster.yaml"
        changed.write_text(yaml.safe_dump(content))
        with running(changed, state, MODEL) as cluster, ControlClient(cluster.url, cluster.token) as client:
            first_plan(cluster)
            return [asyncio.run(recover(cluster, client, history)) for history in histories]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", type=Path, default=Path("data/clusters/home.yaml"))
    parser.add_argument("--state", type=Path, default=Path(".resplit/recovery"))
    parser.add_argument("--copy-every", type=int, nargs="+", default=[4, 0])
    parser.add_argument("--histories", type=int, nargs="+", default=[16, 64, 192])
    given = parser.parse_args()
    print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for copy_every in given.copy_every:
        for recovered in measure(given.cluster, given.state, copy_every, given.histories):
            row = [copy_every or "never", *astuple(recovered)]
            shown = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
            print("| " + " | ".join(shown) + " |", flush=True)
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
