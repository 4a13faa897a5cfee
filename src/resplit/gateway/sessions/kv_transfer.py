"""Transfers of a session's caches between nodes, for a move or after a loss: which are needed, and the requests."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from resplit.errors import NodeLostError
from resplit.gateway.sessions.permits import Held, SessionPermits
from resplit.types import BlockFeatures
from resplit.wire.node_pb2 import TransferRequest
from resplit.wire.routes import Route

# The switch transfers at most this many positions, unless another round of pre-copying would not send fewer.
_PATCH_POSITIONS = 2


def another_round_pays(missing: int, last_round: int) -> bool:
    """Whether a move is to pre-copy the `missing` positions before it switches. The last round sent `last_round`."""
    return _PATCH_POSITIONS < missing < last_round


@dataclass(frozen=True)
class CacheTransfer:
    """Transfer positions `first..last-1` of the cache of a block from one node to another."""

    block: int
    source: str
    target: str
    first: int
    last: int


@dataclass(frozen=True)
class PreCopy:
    """The caches transferred so far for a move to `target`: the last round sent positions `first..last-1`.

    `cache_bytes` counts all rounds.
    """

    target: Route
    first: int = 0
    last: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True)
class RestorePlan:
    """The caches that can be restored: after `transfers`, all hosts hold the first `steps` passes of a session.

    These passes have `positions` positions in all.
    """

    steps: int
    positions: int
    transfers: tuple[CacheTransfer, ...]


def plan_move(
    old: Route, new: Route, features: Sequence[BlockFeatures], first: int, last: int
) -> tuple[CacheTransfer, ...]:
    """Transfers of positions `first..last-1` of every block with a cache whose node differs between two routes."""
    return tuple(
        CacheTransfer(block, source, target, first, last)
        for block, (source, target) in enumerate(zip(old.placement, new.placement, strict=True))
        if source != target and features[block].kv_bytes_per_token > 0
    )


def plan_restore(held: Held, placement: Sequence[str], cached: Iterable[int], steps: Sequence[int]) -> RestorePlan:
    """Restore as many passes as possible under a placement, from the caches of the blocks `cached` that nodes hold.

    `steps` are the lengths of the passes done, in positions. Only whole passes count: a prompt is
    one pass, and its positions would get other bits in a pass that begins in the middle of it.
    """
    holders = {block: max(held, key=lambda node: held[node].get(block, 0), default="") for block in cached}
    available = min((held[node].get(block, 0) if node else 0 for block, node in holders.items()), default=0)
    ends = [end for end in accumulate(steps) if end <= available]
    positions = ends[-1] if ends else 0
    transfers = [
        CacheTransfer(block, node, placement[block], present, positions)
        for block, node in holders.items()
        if (present := held.get(placement[block], {}).get(block, 0)) < positions
    ]
    return RestorePlan(len(ends), positions, tuple(transfers))


async def transfer_caches(
    permits: SessionPermits, transfers: Iterable[CacheTransfer], blocks: int, background: bool = False
) -> int:
    """Have nodes transfer a session's caches, at once or in the `background`; returns the bytes transferred.

    `blocks` is the length of the model's chain. NodeLostError if a transfer fails.
    """
    senders: dict[str, dict[int, str]] = defaultdict(dict)
    groups: dict[tuple[str, int, int], list[CacheTransfer]] = defaultdict(list)  # one request each
    for transfer in transfers:
        senders[transfer.target][transfer.block] = transfer.source
        groups[transfer.source, transfer.first, transfer.last].append(transfer)
    await permits.allow(senders)
    requests = []
    for (source, first, last), group in groups.items():
        target = [""] * blocks  # the node that receives each block's cache; empty: none does
        for transfer in group:
            target[transfer.block] = transfer.target
        request = TransferRequest(session=permits.session, attempt=permits.attempt, target=target)
        request.first, request.last, request.background = first, last, background
        requests.append((permits.peer(source), request))
    replies = await asyncio.gather(*(peer.transfer_cache(request) for peer, request in requests))
    for reply in replies:
        if reply.error:
            raise NodeLostError(f"cache of session {permits.session}: {reply.error}")
    return sum(reply.bytes for reply in replies)
