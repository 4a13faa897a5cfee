"""The objects that all sessions of one gateway share: cluster file, connections, admission, journal and pause gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from resplit.config import ClusterConfig
from resplit.gateway.sessions.admission import Admission
from resplit.gateway.sessions.journal import Journal
from resplit.gateway.sessions.kv_transfer import CacheTransfer, transfer_caches
from resplit.gateway.sessions.pause_gate import PauseGate
from resplit.gateway.sessions.permits import SessionPermits
from resplit.gateway.sessions.router import Router
from resplit.gateway.sessions.speculation import RouteTimes
from resplit.pass_times import PassTime
from resplit.types import BlockFeatures


@dataclass
class SessionContext:
    """`cluster`, `features` and `drained` change with the cluster file, so sessions read them at each use.

    `drained` nodes store no KV replicas. `on_moved` is called when a session has left its old epoch for a newer one,
    `on_pass` with the times of each pass.
    """

    cluster: ClusterConfig
    features: Sequence[BlockFeatures]
    router: Router
    admission: Admission
    journal: Journal
    drained: frozenset[str] = frozenset()
    gate: PauseGate = field(default_factory=PauseGate)
    times: RouteTimes = field(default_factory=RouteTimes)
    on_moved: Callable[[], None] = lambda: None
    on_pass: Callable[[PassTime], None] = lambda done: None

    async def transfer(
        self, permits: SessionPermits, transfers: Sequence[CacheTransfer], background: bool = False
    ) -> int:
        """Have nodes transfer a session's caches, as `transfer_caches` says, as long as the privacy rule allows it."""
        async with self.router.transferring(frozenset((each.block, each.target) for each in transfers)):
            return await transfer_caches(permits, transfers, len(self.features), background)
