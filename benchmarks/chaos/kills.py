"""A random node is killed at a random moment, restarted and used again, many times.

Measures how long detection, planning, loading and replay take, and when every stream has tokens again.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.findings import Finding, quantile, spread, stream_findings
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from tests.support.cluster import NODES, load_unsplit, make_model, random_placement, started
from tests.support.processes import answering, kill, lost, poll_until
from tests.support.streams import Streams, expected_tokens, streaming

KILLS = 30
NEW_TOKENS = 160
DETECTED_WITHIN_S = 1.0
RESUMED_WITHIN_S = 5.0


@dataclass
class Times:
    """Seconds of each loss: detection, planning, preparing, and from the kill until every stream has tokens."""

    detect_s: list[float] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)


async def run(scale: float, folder: Path) -> list[Finding]:
    """30 kills, one after another, under eight streams."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    with started(folder, model) as cluster:
        return await kill_nodes(cluster, expected, max(2, round(KILLS * scale)))


async def kill_nodes(cluster: Cluster, expected: list[list[int]], kills: int) -> list[Finding]:
    """Kill nodes of a running cluster. `expected` holds the tokens of each stream of one request."""
    rng, times = random.Random(11), Times()
    with ControlClient(cluster.url, cluster.token) as client:
        earlier = len(client.records())
        async with streaming(cluster, expected) as streams:
            for _ in range(kills):
                await asyncio.to_thread(use_all, client, rng)
                await asyncio.sleep(rng.uniform(0.1, 1.5))
                await one_kill(cluster, client, streams, [rng.choice(NODES)], times)
        moves = [move for record in client.records(earlier) for move in record.moves]
    replays_s = [move.pause_s for move in moves if move.replayed]
    count = Finding("kills", "kills of nodes that served", str(kills))
    return [*stream_findings("kills", streams), count, *time_findings("kills", times, replays_s)]


async def one_kill(cluster: Cluster, client: ControlClient, streams: Streams, victims: list[str], times: Times) -> None:
    """Kill nodes at once, wait until every stream has tokens, restart the nodes and wait until they answer."""
    before = client.last_decision()
    killed_s = min([kill(cluster, victim) for victim in victims])
    await poll_until(lambda: lost(client, *victims))
    times.detect_s.append(time.monotonic() - killed_s)
    await poll_until(lambda: streams.all_since(killed_s + times.detect_s[-1]))
    times.resumed_s.append(max(streams.first_after(killed_s + times.detect_s[-1])) - killed_s)
    for decision in client.decisions(before):
        if decision.action == "recover" and (outcome := decision.outcome):
            times.plan_s.append(outcome.plan_s or 0.0)
            times.load_s.append(outcome.prepare_s or 0.0)
    for victim in victims:
        start_process(cluster, victim)
    await poll_until(lambda: answering(client, *victims))


def use_all(client: ControlClient, rng: random.Random) -> None:
    """Deploy a placement that uses every node, so that the loss of any node matters."""
    while True:
        live = client.model()
        placement = random_placement(len(live.features), rng)
        if set(placement) == set(NODES):
            try:
                client.propose(Proposal(placement, "re-split", live.epoch))
                return
            except ProposalRefusedError:  # a node that just returned has changed the epoch
                time.sleep(0.1)


def time_findings(experiment: str, times: Times, replays_s: list[float]) -> list[Finding]:
    """The findings on how long losses took."""
    return [
        Finding(
            experiment,
            "time from the kill until the node is listed as lost",
            spread(times.detect_s),
            f"max < {DETECTED_WITHIN_S:g} s",
            met=quantile(times.detect_s, 1.0) < DETECTED_WITHIN_S,
        ),
        Finding(experiment, "time to plan without the lost node", spread(times.plan_s)),
        Finding(experiment, "time to prepare and commit (load)", spread(times.load_s)),
        Finding(experiment, "pause of a replayed session, the wait for the plan included", spread(replays_s)),
        Finding(
            experiment,
            "time from the kill until every stream has tokens again",
            spread(times.resumed_s),
            f"max < {RESUMED_WITHIN_S:g} s",
            met=quantile(times.resumed_s, 1.0) < RESUMED_WITHIN_S,
        ),
    ]
