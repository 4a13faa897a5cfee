"""Two nodes are killed at once; one trusted node remains. Streams continue as after the loss of one node."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

from benchmarks.chaos.findings import Finding, stream_findings
from benchmarks.chaos.kills import NEW_TOKENS, Times, one_kill, time_findings, use_all
from resplit.cluster.client import ControlClient
from tests.support.cluster import NODES, TRUSTED, load_unsplit, make_model, started
from tests.support.streams import expected_tokens, streaming

ROUNDS = 10


async def run(scale: float, folder: Path) -> list[Finding]:
    """10 losses of a random pair of nodes."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    rng, times = random.Random(12), Times()
    pairs = [list(pair) for pair in itertools.combinations(NODES, 2) if set(pair) != set(TRUSTED)]
    with started(folder, model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        async with streaming(cluster, expected) as streams:
            for _ in range(max(1, round(ROUNDS * scale))):
                await asyncio.to_thread(use_all, client, rng)
                await asyncio.sleep(rng.uniform(0.1, 1.5))
                await one_kill(cluster, client, streams, rng.choice(pairs), times)
        moves = [move for record in client.records() for move in record.moves]
    replays_s = [move.pause_s for move in moves if move.replayed]
    return [*stream_findings("double_kill", streams), *time_findings("double_kill", times, replays_s)]
