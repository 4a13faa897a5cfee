"""Where a session's caches are, where they should go, and the orders to nodes that bring them there.

Pure planning and one function that sends; knows nothing of passes, and not why a cache has to go somewhere.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from resplit.config import ClusterConfig
from resplit.errors import NodeLostError
from resplit.types import BlockFeatures
from resplit.wire.node_pb2 import TransferRequest
from resplit.wire.peers import Peer

# Positions held, by node and by block.
Held = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class CacheTransfer:
    """Positions `first..last-1` of the cache of a block, from one node to another."""

    block: int
    source: str
    target: str
    first: int
    last: int


@dataclass(frozen=True)
class RestorePlan:
    """What is left of a session's caches: all of its first `steps` passes, which are `positions` positions long, once
    the caches have made its `transfers`."""

    steps: int
    positions: int
    transfers: tuple[CacheTransfer, ...]


def plan_restore(held: Held, placement: Sequence[str], cached: Iterable[int], steps: Sequence[int]) -> RestorePlan:
    """The most that can be restored under a placement of what nodes hold of the blocks `cached`.

    Only whole passes count (`steps` are their lengths): what follows is computed again in the same shapes.
    """
    best = {block: max(held, key=lambda node: held[node].get(block, 0), default="") for block in cached}
    least = min((held[node].get(block, 0) if node else 0 for block, node in best.items()), default=0)
    ends = [end for end in accumulate(steps) if end <= least]
    positions = ends[-1] if ends else 0
    transfers = [
        CacheTransfer(block, node, placement[block], there, positions)
        for block, node in best.items()
        if (there := held.get(placement[block], {}).get(block, 0)) < positions
    ]
    return RestorePlan(len(ends), positions, tuple(transfers))


def room_for_copies(
    cluster: ClusterConfig, features: Sequence[BlockFeatures], placement: Sequence[str], nodes: Iterable[str]
) -> dict[str, float]:
    """Bytes that each of `nodes` has beside its blocks and the caches that it reserves room for."""
    room = {name: float(cluster.node(name).memory) for name in nodes}
    for block, name in zip(features, placement, strict=True):
        if name in room:
            room[name] -= block.weight_bytes + cluster.kv_tokens * block.kv_bytes_per_token
    return room


def stand_bys(
    cluster: ClusterConfig,
    features: Sequence[BlockFeatures],
    placement: Sequence[str],
    nodes: Collection[str],
    kept: Mapping[int, str],
) -> dict[int, str]:
    """For each block with a cache, one of `nodes` to keep a copy of it: never its host, trusted where it is private.

    Who keeps a copy already (`kept`) goes on; else neighbours go together to where there is most room. A block for
    which nobody has room is left out.
    """
    room = room_for_copies(cluster, features, placement, nodes)
    chosen: dict[int, str] = {}
    last = ""
    for block, feature in enumerate(features):
        if feature.kv_bytes_per_token == 0:
            continue
        need = cluster.kv_tokens * feature.kv_bytes_per_token
        able = [n for n in room if n != placement[block] and (not feature.private or n in cluster.trusted)]
        able = [n for n in able if room[n] >= need]
        if not able:
            continue
        preferred = [n for n in (kept.get(block, ""), last) if n in able]
        last = chosen[block] = preferred[0] if preferred else max(able, key=lambda name: room[name])
        room[last] -= need
    return chosen


async def transfer_caches(
    peers: Mapping[str, Peer],
    session: str,
    attempt: int,
    transfers: Iterable[CacheTransfer],
    blocks: int,
    background: bool = False,
) -> int:
    """Have caches of a session go their ways, at once, or in the `background`; the bytes that went.

    `blocks` is the length of the model's chain. NodeLostError where one cannot go.
    """
    together: dict[tuple[str, int, int], list[CacheTransfer]] = defaultdict(list)
    for transfer in transfers:
        together[transfer.source, transfer.first, transfer.last].append(transfer)
    orders = []
    for (source, first, last), group in together.items():
        target = [""] * blocks
        for transfer in group:
            target[transfer.block] = transfer.target
        order = TransferRequest(
            session=session, attempt=attempt, target=target, first=first, last=last, background=background
        )  # fmt: skip
        orders.append(peers[source].transfer_cache(order))
    replies = await asyncio.gather(*orders)
    for reply in replies:
        if reply.error:
            raise NodeLostError(f"cache of session {session}: {reply.error}")
    return sum(reply.bytes for reply in replies)
