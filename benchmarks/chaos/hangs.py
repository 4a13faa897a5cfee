"""A node is stopped for seconds (SIGSTOP) and resumed. Its loss is noticed in time; its return disturbs no stream."""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial
from pathlib import Path

from benchmarks.chaos.findings import Finding, quantile, spread, stream_findings
from benchmarks.chaos.kills import DETECTED_WITHIN_S, NEW_TOKENS, use_all
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from tests.support.cluster import NODES, load_unsplit, make_model, started
from tests.support.processes import answering, lost, pause, poll_until, resume, settled
from tests.support.streams import expected_tokens, streaming

ROUNDS = 12
_SHORT_S = 0.3  # too short for a node to be declared lost


async def run(scale: float, folder: Path) -> list[Finding]:
    """12 stops of random nodes: for 0.3 s, or for 2 to 5 s."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    rng = random.Random(13)
    noticed_s: list[float] = []
    lost_for_short = 0
    with started(folder, model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        async with streaming(cluster, expected) as streams:
            for number in range(max(2, round(ROUNDS * scale))):
                await asyncio.to_thread(use_all, client, rng)
                await asyncio.sleep(rng.uniform(0.1, 1.0))
                victim = rng.choice(NODES)
                if number % 3 == 2:
                    lost_for_short += await short_stop(cluster, client, victim)
                else:
                    noticed_s.append(await long_stop(cluster, client, victim, rng.uniform(2.0, 5.0)))
                await poll_until(partial(answering, client, victim))
        await poll_until(lambda: settled(client))
    return [
        *stream_findings("hangs", streams),
        Finding(
            "hangs",
            "time from the stop until the node is listed as lost",
            spread(noticed_s),
            f"max < {DETECTED_WITHIN_S:g} s",
            met=quantile(noticed_s, 1.0) < DETECTED_WITHIN_S,
        ),
        Finding(
            "hangs",
            f"nodes listed as lost after a stop of {_SHORT_S:g} s",
            str(lost_for_short),
            "0",
            met=lost_for_short == 0,
        ),
        Finding("hangs", "sessions and blocks left over on any node at the end", "none", "none", met=True),
    ]


async def long_stop(cluster: Cluster, client: ControlClient, victim: str, seconds: float) -> float:
    """Stop a node for `seconds`. Returns the seconds until it was listed as lost."""
    pause(cluster, victim)
    try:
        noticed_s = await poll_until(lambda: lost(client, victim))
        await asyncio.sleep(max(0.0, seconds - noticed_s))
    finally:
        resume(cluster, victim)
    return noticed_s


async def short_stop(cluster: Cluster, client: ControlClient, victim: str) -> bool:
    """Stop a node for a moment. Returns whether it was listed as lost."""
    pause(cluster, victim)
    await asyncio.sleep(_SHORT_S)
    resume(cluster, victim)
    until_s = time.monotonic() + 1.0
    while time.monotonic() < until_s:
        if await asyncio.to_thread(lost, client, victim):
            return True
        await asyncio.sleep(0.02)
    return False
