"""Random placements, one after another, under eight streams. No stream fails, restarts or gets a wrong token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.findings import Finding, spread, stream_findings
from resplit.cluster.client import ControlClient
from resplit.epochs import Proposal
from resplit.session_records import SessionMove
from resplit.types import segments_of
from tests.support.cluster import load_unsplit, make_model, random_placement, started
from tests.support.streams import expected_tokens, streaming

PLACEMENTS = 50
NEW_TOKENS = 128


async def run(scale: float, folder: Path) -> list[Finding]:
    """50 placements: re-splits and redistributions (same cuts, other nodes) in turn."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    wanted = max(3, round(PLACEMENTS * scale))
    with started(folder, model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        async with streaming(cluster, expected) as streams:
            took_s = await asyncio.to_thread(deploy_one_after_another, client, wanted, random.Random(5))
        moves = [move for record in client.records() for move in record.moves]
    return [
        *stream_findings("resplits", streams),
        Finding("resplits", "placements deployed while streams run", str(len(took_s)), str(wanted), met=True),
        Finding("resplits", "time from a proposal to its commit", spread(took_s)),
        Finding("resplits", "sessions moved", str(len(moves)), "> 0", met=bool(moves)),
        Finding(
            "resplits",
            "sessions replayed from the start",
            str(sum(m.replayed for m in moves)),
            "0",
            met=not _any_replayed(moves),
        ),
        Finding("resplits", "cache bytes transferred", f"{sum(m.cache_bytes for m in moves) / 2**20:.1f} MiB"),
    ]


def deploy_one_after_another(client: ControlClient, count: int, rng: random.Random) -> list[float]:
    """Deploy random placements, every second one with the previous cuts. Returns the seconds that each took."""
    took_s = []
    for number in range(count):
        live = client.model()
        blocks = len(live.features)
        placement = redistributed(live.placement or (), rng) if number % 2 else random_placement(blocks, rng)
        action = "redistribute" if number % 2 else "re-split"
        deployed = client.propose(Proposal(placement, action, live.epoch))
        took_s.append(deployed.prepare_s)
    return took_s


def redistributed(placement: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """The same segments on other nodes. A segment with a private block stays on trusted nodes."""
    result: list[str] = []
    for segment in segments_of(tuple(placement)):
        private = segment.first < 2 or segment.last == len(placement) - 1
        node = rng.choice(("alpha", "beta") if private else ("alpha", "beta", "gamma", "delta"))
        result += [node] * (segment.last - segment.first + 1)
    return tuple(result)


def _any_replayed(moves: list[SessionMove]) -> bool:
    return any(move.replayed for move in moves)
