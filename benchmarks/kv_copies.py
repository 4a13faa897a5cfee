"""What KV replicas cost: processor time for each position that is copied, by the positions in a copy.

`python -m benchmarks.kv_copies` runs two nodes and a gateway in this process, with TLS between them, and prints a
table. Each node sends the caches of its half of the model to the other one. Nothing else runs, so what copies cost
passes that run beside them is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving.clusters import MODEL
from resplit.config import ClusterConfig
from resplit.gateway.sessions.kv_transfer import CacheTransfer, transfer_caches
from resplit.gateway.sessions.permits import SessionPermits
from resplit.model.activation import Activation
from resplit.model.source import StoredModel, obtain
from resplit.process import event_loop
from resplit.security.identity import CONTROLLER
from resplit.wire.cache_stream import OutgoingPart
from tests.support.in_process import InProcessCluster, deploy

NAMES = ("alpha", "beta")
SESSIONS = 8
CACHED = 640  # positions of each session
CAPACITY = 2048
_NAMES_OF_SESSIONS = (f"session-{number}" for number in itertools.count())


class _Direct:
    """No proxy: it would take processor time, too."""

    async def open(self) -> None: ...

    def close(self) -> None: ...


def cluster_of() -> ClusterConfig:
    """Two nodes with room for the caches of all sessions, and for their replicas."""
    return ClusterConfig.model_validate(
        {
            "name": "copies",
            "source": "alpha",
            "trusted": NAMES,
            "nodes": [{"name": name, "memory": "3 GiB"} for name in NAMES],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "limits": {"context_tokens": CAPACITY, "copy_every": 0},
            "kv_tokens": SESSIONS * CAPACITY,
        }
    )


async def begin(nodes: InProcessCluster, model: StoredModel, placement: Sequence[str]) -> SessionPermits:
    """A new session whose caches the hosts of the blocks hold."""
    session = next(_NAMES_OF_SESSIONS)
    shape = 2, model.spec.kv_heads, CACHED, model.spec.head_width
    cache = Activation("float32", shape, bytes(4 * shape[0] * shape[1] * shape[2] * shape[3]))
    for name in NAMES:
        hosted = [b for b, node in enumerate(placement) if node == name and nodes.features[b].kv_bytes_per_token]
        await nodes.permit(name, session, capacity=CAPACITY, senders=dict.fromkeys(hosted, CONTROLLER))
        await nodes.peer(name).cache([OutgoingPart(session, 0, (block,), 0, [cache]) for block in hosted])
    return SessionPermits(session, CAPACITY, nodes.router.peers)


async def copy(
    nodes: InProcessCluster, placement: Sequence[str], permits: SessionPermits, first: int, last: int
) -> None:
    """Copy positions `first..last-1` of every cache to the other node, as a running session does."""
    groups: defaultdict[str, list[CacheTransfer]] = defaultdict(list)
    for block, source in enumerate(placement):
        if nodes.features[block].kv_bytes_per_token:
            target = NAMES[source == NAMES[0]]
            groups[target].append(CacheTransfer(block, source, target, first, last))
    blocks = len(placement)
    await asyncio.gather(*(transfer_caches(permits, group, blocks, background=True) for group in groups.values()))


async def costs_ms(nodes: InProcessCluster, model: StoredModel, placement: Sequence[str], every: int) -> list[float]:
    """Milliseconds of processor time for each position, for each round of copies of all sessions."""
    permits = [await begin(nodes, model, placement) for _ in range(SESSIONS)]
    found = []
    for first in range(0, CACHED - every + 1, every):
        used_s = time.process_time()
        await asyncio.gather(*(copy(nodes, placement, each, first, first + every) for each in permits))
        found.append((time.process_time() - used_s) / SESSIONS / every * 1e3)
    for name in NAMES:
        await nodes.peer(name).close_sessions([each.session for each in permits])
    return found


async def measure(model: StoredModel, everies: Sequence[int], repeats: int) -> None:
    """Measure, in turns, and print a row for each number of positions in a copy."""
    with tempfile.TemporaryDirectory() as folder:
        nodes = InProcessCluster(cluster_of(), model, Path(folder))
        nodes.proxies, nodes.inside = dict.fromkeys(NAMES, _Direct()), nodes.addresses  # type: ignore[arg-type]
        for name in NAMES:
            await nodes.start(name)
        controller = nodes.controller()
        await controller.membership.introduce()
        blocks = len(nodes.features)
        placement = [*(NAMES[2 * block // blocks] for block in range(blocks - 1)), NAMES[0]]
        await deploy(controller, placement)
        found: defaultdict[int, list[float]] = defaultdict(list)
        for _ in range(repeats):
            for every in everies:
                found[every] += await costs_ms(nodes, model, placement, every)
        print("| positions in a copy | processor time of a position, ms | the same, lower quartile |\n|" + " --- |" * 3)
        for every, costs in found.items():
            print(f"| {every} | {statistics.median(costs):.3f} | {statistics.quantiles(costs, n=4)[0]:.3f} |")
        await controller.stop()
        await nodes.stop_all()
        nodes.cleanup.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_copies", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"))
    parser.add_argument("--every", type=int, nargs="+", default=[4, 16, 32, 64], help="positions in a copy")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    event_loop.run(measure(obtain(MODEL, given.models, "int4"), given.every, given.repeats))


if __name__ == "__main__":
    main()
