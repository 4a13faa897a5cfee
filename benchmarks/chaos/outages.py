"""The registry is unreachable, or the disk is full, for seconds under eight streams, also while a node is killed.

Changes must be refused with the reason, streams must continue, and changes must succeed afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.chaos.findings import Finding, stream_findings
from benchmarks.chaos.kills import NEW_TOKENS, use_all
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from tests.support.cluster import NODES, load_unsplit, make_model, random_placement, started
from tests.support.processes import answering, kill, lost, poll_until, settled
from tests.support.streams import expected_tokens, streaming

ROUNDS = 4
_LASTS_S = 2.0


async def run(scale: float, folder: Path) -> list[Finding]:
    """4 times each: no registry, a full disk, and a full disk with a node killed."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    rng, rounds = random.Random(17), max(1, round(ROUNDS * scale))
    refusals: dict[str, list[str]] = {"registry": [], "disk": []}
    with started(folder, model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        async with streaming(cluster, expected) as streams:
            for _ in range(rounds):
                for name, outage in (("registry", no_registry), ("disk", full_disks)):
                    await asyncio.to_thread(use_all, client, rng)
                    with outage(cluster):
                        refusals[name].append(await asyncio.to_thread(refusal, client, rng))
                        await asyncio.sleep(_LASTS_S)
                await asyncio.to_thread(use_all, client, rng)
                await lose_with_full_disks(cluster, client, rng.choice(NODES))
                await asyncio.to_thread(use_all, client, rng)
        await poll_until(lambda: settled(client))
        dead = cluster.dead()
    words = {"registry": "registry", "disk": "cannot be written"}
    named = {name: sum(words[name] in message for message in messages) for name, messages in refusals.items()}
    return [
        *stream_findings("outages", streams),
        *(
            Finding("outages", f"changes refused with the reason, {name}", f"{n} of {rounds}", str(rounds), n == rounds)
            for name, n in named.items()
        ),
        Finding("outages", "nodes killed while the disk is full, and replaced once there is room", str(rounds)),
        Finding("outages", "processes that ended by themselves", ", ".join(dead) or "none", "none", met=not dead),
        *(Finding("outages", f"the reason given, {name}", messages[0]) for name, messages in refusals.items()),
    ]


def refusal(client: ControlClient, rng: random.Random) -> str:
    """Propose a random placement. Returns the reason of the refusal, or an empty string."""
    live = client.model()
    placement = random_placement(len(live.features), rng)
    while placement == live.placement:
        placement = random_placement(len(live.features), rng)
    try:
        client.propose(Proposal(placement, "re-split", live.epoch))
    except ProposalRefusedError as error:
        return str(error)
    return ""


async def lose_with_full_disks(cluster: Cluster, client: ControlClient, victim: str) -> None:
    """Kill a node while no file can grow. The epoch without it must be logged, so it goes live only afterwards."""
    with full_disks(cluster):
        kill(cluster, victim)
        await poll_until(lambda: lost(client, victim))
        await asyncio.sleep(_LASTS_S)
    await poll_until(lambda: victim not in (client.model().placement or ()))
    start_process(cluster, victim)
    await poll_until(lambda: answering(client, victim))


@contextlib.contextmanager
def no_registry(cluster: Cluster) -> Iterator[None]:
    """Rename the registry's folder until the end of the block."""
    shards, away = cluster.state / "registry", cluster.state / "away"
    shards.rename(away)
    try:
        yield
    finally:
        away.rename(shards)


@contextlib.contextmanager
def full_disks(cluster: Cluster) -> Iterator[None]:
    """Until the end of the block, no file of any process can grow."""
    alive = [psutil.Process(process.pid) for process in cluster.processes.values() if process.poll() is None]
    before = [(process, process.rlimit(psutil.RLIMIT_FSIZE)) for process in alive]
    for process, limits in before:
        process.rlimit(psutil.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        for process, limits in before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, limits)
