"""Polls every node for its state and telemetry, keeps the last minutes of both, and watches for nodes that hang."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping

import structlog

from resplit.control.heartbeat import Heartbeats
from resplit.errors import DataError, NodeLostError
from resplit.status import NodeReport, ReportedState
from resplit.telemetry_rows import BlockRow, LinkRow, NodeRow, TelemetryRows
from resplit.wire.peers import Peer

_log = structlog.get_logger(__name__)
PERIOD_S = 1.0
KEEP_S = 600.0
_ANSWER_WITHIN_S = 5.0


class Monitor:
    """Telemetry rows of all nodes in order of arrival, and the newest state of each node."""

    def __init__(self, peers: Mapping[str, Peer], on_hang: Callable[[str], None] = lambda node: None) -> None:
        self._peers = peers
        self._heartbeats = Heartbeats(peers, on_hang)
        self._polling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._last_row: dict[str, int] = {}  # the number of the last row stored, by node
        self._nodes: deque[NodeRow] = deque()
        self._links: deque[LinkRow] = deque()
        self._blocks: deque[BlockRow] = deque()
        self.states: dict[str, ReportedState] = {}
        self._stopped = False

    def heard(self, name: str) -> None:
        """Note a sign of life of a node."""
        self._heartbeats.heard(name)

    async def run(self) -> None:
        """Poll every node at its own pace, including nodes that join later, and watch for hangs, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._heartbeats.run(), name="heartbeats")
            watched = set[str]()
            try:
                while True:
                    for name in self._peers.keys() - watched:
                        tasks.create_task(self._watch(name), name=f"watch {name}")
                    watched = set(self._peers)
                    self._forget(time.time() - KEEP_S)
                    await asyncio.sleep(PERIOD_S)
            finally:
                self._stopped = True  # ends tasks whose cancellation was lost in a call (see `resplit.cancellation`)

    async def poll(self, name: str) -> None:
        """Ask one node for a report now, after any poll of it that is under way.

        If the node does not answer, or its answer cannot be read, its last state is kept.
        """
        # One poll at a time: two with the same last row would both store the rows after it.
        async with self._polling[name]:
            peer = self._peers.get(name)
            if peer is None:  # the node left the cluster while this poll waited
                return
            try:
                report, last_row = await self._report(name, peer)
            except NodeLostError:
                return
            except DataError as error:
                _log.warning("a node's report is ignored", node=name, error=str(error))
                return
            self.heard(name)
            self._store(name, report, last_row)

    def rows(self, since_s: float) -> TelemetryRows:
        """Rows not older than `since_s` (seconds since 1970), by table."""
        return TelemetryRows(
            nodes=tuple(row for row in self._nodes if row.time_s >= since_s),
            links=tuple(row for row in self._links if row.time_s >= since_s),
            blocks=tuple(row for row in self._blocks if row.time_s >= since_s),
        )

    async def _watch(self, name: str) -> None:
        while name in self._peers and not self._stopped:
            await self.poll(name)
            await asyncio.sleep(PERIOD_S)

    def _store(self, name: str, report: NodeReport, last_row: int) -> None:
        self._last_row[name] = last_row
        self.states[name] = report.state
        self._nodes.extend(report.rows.nodes)
        self._links.extend(report.rows.links)
        self._blocks.extend(report.rows.blocks)

    async def _report(self, name: str, peer: Peer) -> tuple[NodeReport, int]:
        """The node's report with its new rows. With all rows if it restarted, because it then counts from 0 again."""
        known = self.states.get(name)
        report, last_row = await peer.report(self._last_row.get(name, 0), _ANSWER_WITHIN_S)
        if known and known.pid != report.state.pid:
            return await peer.report(0, _ANSWER_WITHIN_S)
        return report, last_row

    def _forget(self, before_s: float) -> None:
        for rows in (self._nodes, self._links, self._blocks):
            while rows and rows[0].time_s < before_s:
                rows.popleft()
