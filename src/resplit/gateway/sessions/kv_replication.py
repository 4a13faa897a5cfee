"""KV replicas: copies of a running session's caches on stand-by nodes, made in the background."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from resplit.config import ClusterConfig
from resplit.errors import ResplitError
from resplit.gateway.sessions.context import SessionContext
from resplit.gateway.sessions.kv_transfer import CacheTransfer
from resplit.gateway.sessions.permits import Held, SessionPermits
from resplit.types import BlockFeatures
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class KvReplica:
    """A copy of the first `positions` positions of a block's cache on a node that does not host the block."""

    node: str
    positions: int


def replica_room_bytes(
    cluster: ClusterConfig, features: Sequence[BlockFeatures], placement: Sequence[str], nodes: Iterable[str]
) -> dict[str, float]:
    """The memory of each of `nodes` that its blocks and their reserved caches leave free."""
    room_bytes = {name: float(cluster.node(name).memory) for name in nodes}
    for block, name in zip(features, placement, strict=True):
        if name in room_bytes:
            room_bytes[name] -= block.weight_bytes + cluster.kv_tokens * block.kv_bytes_per_token
    return room_bytes


def choose_stand_bys(
    cluster: ClusterConfig,
    features: Sequence[BlockFeatures],
    placement: Sequence[str],
    nodes: Collection[str],
    current: Mapping[int, str],
) -> dict[int, str]:
    """For each block with a cache, one of `nodes` for its replica: never its host, and trusted if it is private.

    The `current` stand-by node of a block keeps its replica if that is still allowed. Otherwise the replica goes to the
    node of the replica before it, or to the node with most room. A block is left out if no node has room.
    """
    room_bytes = replica_room_bytes(cluster, features, placement, nodes)
    chosen: dict[int, str] = {}
    last = ""
    for block, feature in enumerate(features):
        if feature.kv_bytes_per_token == 0:
            continue
        replica_bytes = cluster.kv_tokens * feature.kv_bytes_per_token
        allowed = [n for n in room_bytes if n != placement[block] and (not feature.private or n in cluster.trusted)]
        able = [n for n in allowed if room_bytes[n] >= replica_bytes]
        if not able:
            continue
        preferred = [n for n in (current.get(block, ""), last) if n in able]
        last = chosen[block] = preferred[0] if preferred else max(able, key=lambda name: room_bytes[name])
        room_bytes[last] -= replica_bytes
    return chosen


class KvReplication:
    """The replicas of one session. They lag by `copy_every` positions at most, plus those added during one copy."""

    def __init__(self, permits: SessionPermits, context: SessionContext) -> None:
        self._permits = permits
        self._context = context
        self._copying: asyncio.Task[None] | None = None  # at most one copy at a time
        self._target = 0  # the position up to which the current copy goes
        self._copied = 0  # the position that all replicas have reached; 0 after `stop`
        self._replicas: dict[int, KvReplica] = {}  # by block
        self._refusing: set[str] = set()  # nodes that refused a replica under the current route
        self.sent_bytes = 0
        self.max_lag = 0  # the most positions that passes added during one copy

    def advance(self, route: Route, position: int, may_begin: bool) -> None:
        """After a pass: begin a copy if `copy_every` positions were added, no copy is under way, and it `may_begin`."""
        every = self._context.cluster.limits.copy_every
        if self._copying and not self._copying.done():
            self.max_lag = max(self.max_lag, position - self._target)
        elif may_begin and 0 < every <= position - self._copied:
            self._target = position
            self._copying = asyncio.create_task(self._copy(route, position))

    def stop(self) -> None:
        """Cancel the current copy, because route, attempt or nodes change; the next one chooses stand-by nodes anew."""
        if self._copying:
            self._copying.cancel()
        self._copying, self._copied = None, 0
        self._refusing.clear()

    def forget(self, node: str) -> None:
        """Assume that a node holds no replica and refuses none: it was lost, or answers again.

        A copy to the nodes that are there begins after the next pass.
        """
        self.stop()
        self._replicas = {block: replica for block, replica in self._replicas.items() if replica.node != node}

    def adopt(self, held: Held, route: Route, position: int) -> None:
        """After a loss: adopt as replicas, up to `position`, caches on nodes that do not host their blocks."""
        self._replicas = {}
        for block, host in enumerate(route.placement):
            others = {node: lengths.get(block, 0) for node, lengths in held.items() if node != host}
            longest = max(others, key=lambda node: others[node], default="")
            if longest and others[longest]:
                self._replicas[block] = KvReplica(longest, min(others[longest], position))

    async def _copy(self, route: Route, position: int) -> None:
        """Choose the stand-by nodes, and extend every replica to `position`."""
        context = self._context
        current = {block: replica.node for block, replica in self._replicas.items()}
        available = (context.router.listening & set(context.cluster.node_names)) - context.drained - self._refusing
        chosen = choose_stand_bys(context.cluster, context.features, route.placement, available, current)
        self._replicas = {
            block: self._replicas[block] if current.get(block) == node else KvReplica(node, 0)
            for block, node in chosen.items()
        }
        transfers: dict[str, list[CacheTransfer]] = defaultdict(list)  # by stand-by node
        for block, replica in self._replicas.items():
            if replica.positions < position:
                host = route.placement[block]
                transfers[replica.node].append(CacheTransfer(block, host, replica.node, replica.positions, position))
        await asyncio.gather(*(self._copy_to(node, group) for node, group in transfers.items()))
        self._copied = position

    async def _copy_to(self, node: str, transfers: list[CacheTransfer]) -> None:
        """Extend the replicas on one node. A node that refuses is not chosen again before the route changes."""
        try:
            sent_bytes = await self._context.transfer(self._permits, transfers, background=True)
        except ResplitError as error:
            _log.info("replica refused", session=self._permits.session, node=node, error=str(error))
            self._refusing.add(node)
            for transfer in transfers:
                self._replicas.pop(transfer.block, None)
            return
        self.sent_bytes += sent_bytes  # not `+= await`, which would lose the bytes that other tasks add meanwhile
        for transfer in transfers:
            self._replicas[transfer.block] = KvReplica(node, transfer.last)
