"""Copies of running sessions' caches on stand-by nodes, made behind everything else while the sessions go on.

Knows when a copy is due and who keeps it; what becomes of copies after a loss is for others.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

import structlog

from resplit.config import ClusterConfig
from resplit.errors import ResplitError
from resplit.gateway.sessions.kv_transfer import CacheTransfer, Held, stand_bys, transfer_caches
from resplit.gateway.sessions.router import Router
from resplit.gateway.sessions.session import KvReplica, Session
from resplit.types import BlockFeatures

_log = structlog.get_logger(__name__)


class KvReplication:
    """Keeps each session's copies no further behind than `copy_every` positions and what one copy takes."""

    def __init__(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], router: Router) -> None:
        self._cluster = cluster
        self._features = features
        self._router = router
        self._drained: frozenset[str] = frozenset()

    def reconfigure(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        """Keep copies by other rules from the next one on; none on nodes that are `drained`."""
        self._cluster, self._features, self._drained = cluster, features, drained

    def go_on(self, session: Session) -> None:
        """After a pass: begin a copy of what was added, if that is enough and none is on its transfer."""
        every = self._cluster.limits.copy_every
        if session.replicating and not session.replicating.done():
            session.copy_lag = max(session.copy_lag, session.position - session.keeping_from)
        elif every > 0 and session.position - session.copied >= every and not session.precopying:
            session.keeping_from = session.position
            session.replicating = asyncio.create_task(self._copy(session, session.position))

    def stop(self, session: Session) -> None:
        """Give up the copy that is on its way; the next one looks again who should keep what."""
        if session.replicating:
            session.replicating.cancel()
        session.replicating, session.copied = None, 0
        session.refusing.clear()

    def found(self, session: Session, held: Held) -> None:
        """After a loss: the copies are where nodes say that they are."""
        session.replicas = {}
        for block, host in enumerate(session.route.placement):
            others = {node: lengths.get(block, 0) for node, lengths in held.items() if node != host}
            keeper = max(others, key=lambda node: others[node], default="")
            if keeper and others[keeper]:
                session.replicas[block] = KvReplica(keeper, min(others[keeper], session.position))

    async def _copy(self, session: Session, position: int) -> None:
        """Bring every copy up to a position that all nodes of the route have passed."""
        kept = {block: copy.node for block, copy in session.replicas.items()}
        willing = (self._router.listening & set(self._cluster.node_names)) - self._drained - session.refusing
        chosen = stand_bys(self._cluster, self._features, session.route.placement, willing, kept)
        session.replicas = {
            block: session.replicas[block] if kept.get(block) == node else KvReplica(node, 0)
            for block, node in chosen.items()
        }
        session.nodes |= set(chosen.values())
        by_keeper: dict[str, list[CacheTransfer]] = defaultdict(list)
        for block, copy in session.replicas.items():
            if copy.positions < position:
                host = session.route.placement[block]
                by_keeper[copy.node].append(CacheTransfer(block, host, copy.node, copy.positions, position))
        await asyncio.gather(*(self._copy_to(session, keeper, transfers) for keeper, transfers in by_keeper.items()))
        session.copied = position

    async def _copy_to(self, session: Session, keeper: str, transfers: list[CacheTransfer]) -> None:
        """A node that does not take its copies is asked again in the next epoch only."""
        peers, blocks = self._router.peers, len(self._features)
        try:
            session.copied_bytes += await transfer_caches(
                peers, session.name, session.attempt, transfers, blocks, background=True
            )
        except ResplitError as error:
            _log.info("no copy kept", session=session.name, node=keeper, error=str(error))
            session.refusing.add(keeper)
            for transfer in transfers:
                session.replicas.pop(transfer.block, None)
            return
        for transfer in transfers:
            session.replicas[transfer.block] = KvReplica(keeper, transfer.last)
