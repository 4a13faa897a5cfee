"""Polls every node for its state and telemetry, keeps the last minutes of both, and watches for nodes that hang.

Nodes do not affect one another: each has its own rows, up to a limit, and its own polling pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from resplit.control.heartbeat import Heartbeats
from resplit.errors import NodeLostError
from resplit.status import NodeReport, ReportedState
from resplit.telemetry.rows import BlockRow, LinkRow, NodeRow, TelemetryRows
from resplit.wire.peers import Peer

PERIOD_S, _LEAST_PERIOD_S = 0.5, 0.05  # between two reports of a node, and at least where it has news
KEEP_S = 600.0
_ANSWER_WITHIN_S = 5.0
# A busy node reports fewer than 100 rows a second.
_MAX_ROWS = round(100 * KEEP_S)
_Row = TypeVar("_Row", NodeRow, LinkRow, BlockRow)


@dataclass
class _NodeRows:
    """The rows of one node, in order of arrival."""

    nodes: deque[NodeRow] = field(default_factory=lambda: deque(maxlen=_MAX_ROWS))
    links: deque[LinkRow] = field(default_factory=lambda: deque(maxlen=_MAX_ROWS))
    blocks: deque[BlockRow] = field(default_factory=lambda: deque(maxlen=_MAX_ROWS))


class Monitor:
    """Telemetry rows of all nodes, and the newest state of each node. `blocks` is the length of the model's chain."""

    def __init__(
        self, peers: Mapping[str, Peer], blocks: int, on_hang: Callable[[str], None] = lambda node: None
    ) -> None:
        self._peers = peers
        self._blocks = blocks
        self._heartbeats = Heartbeats(peers, on_hang)
        self._polling: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._news: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # by node: its next report is urgent
        self._last_row: dict[str, int] = {}  # the number of the last row stored, by node
        self._rows: defaultdict[str, _NodeRows] = defaultdict(_NodeRows)  # by node
        self.states: dict[str, ReportedState] = {}
        self.heard_s: dict[str, float] = {}  # when the last report of each node came, in seconds since 1970
        # With the new rows of a node, and its time when it reported them.
        self.on_report: Callable[[TelemetryRows, float], None] = lambda rows, time_s: None
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
                self._stopped = True  # ends tasks whose cancellation was lost in a call (see `process.cancellation`)

    def hurry(self, name: str) -> None:
        """Ask a node for its next report soon: it says that there is news."""
        self._news[name].set()

    async def measure(self, links: Iterable[tuple[str, str]]) -> None:
        """Have nodes measure these links, from one node to another, and report."""
        peers: defaultdict[str, list[str]] = defaultdict(list)
        for node, peer in links:
            peers[node].append(peer)
        await asyncio.gather(*(self._measure(node, each) for node, each in peers.items()))

    async def _measure(self, name: str, others: Sequence[str]) -> None:
        """Have one node measure its links to others, and report. Reports meanwhile have the first results."""
        peer = self._peers.get(name)
        if peer is not None:
            with contextlib.suppress(NodeLostError):
                await peer.measure(others, _ANSWER_WITHIN_S)
            await self.poll(name)

    async def poll(self, name: str) -> None:
        """Ask one node for a report now, after any poll of it that is under way.

        If the node does not answer, or is faulty, its last state is kept.
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
            self.heard(name)
            self._store(name, report, last_row)

    def rows(self, since_s: float) -> TelemetryRows:
        """Rows not older than `since_s` (seconds since 1970), by table, in order of time."""
        return TelemetryRows(
            nodes=_in_order((rows.nodes for rows in self._rows.values()), since_s),
            links=_in_order((rows.links for rows in self._rows.values()), since_s),
            blocks=_in_order((rows.blocks for rows in self._rows.values()), since_s),
        )

    def standby(self) -> dict[str, tuple[int, ...]]:
        """The blocks that stand by, by node."""
        return {name: state.standby.blocks for name, state in self.states.items()}

    async def _watch(self, name: str) -> None:
        news = self._news[name]
        while name in self._peers and not self._stopped:
            news.clear()
            await self.poll(name)
            await asyncio.sleep(_LEAST_PERIOD_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S - _LEAST_PERIOD_S):
                    await news.wait()

    def _store(self, name: str, report: NodeReport, last_row: int) -> None:
        self._last_row[name] = last_row
        self.states[name], self.heard_s[name] = report.state, time.time()
        rows = self._rows[name]
        rows.nodes.extend(report.rows.nodes)
        rows.links.extend(report.rows.links)
        rows.blocks.extend(report.rows.blocks)
        self.on_report(report.rows, report.time_s)

    async def _report(self, name: str, peer: Peer) -> tuple[NodeReport, int]:
        """The node's report with its new rows. With all rows if it restarted, because it then counts from 0 again."""
        known = self.states.get(name)
        report, last_row = await peer.report(self._last_row.get(name, 0), _ANSWER_WITHIN_S)
        if known and known.pid != report.state.pid:
            report, last_row = await peer.report(0, _ANSWER_WITHIN_S)
        held = {*report.state.blocks, *report.state.copies, *report.state.standby.blocks}
        if absent := sorted(block for block in held if block >= self._blocks):
            raise peer.fault(f"it holds block {absent[0]}, and the model has {self._blocks} blocks")
        return report, last_row

    def _forget(self, before_s: float) -> None:
        for rows in self._rows.values():
            for table in (rows.nodes, rows.links, rows.blocks):
                while table and table[0].time_s < before_s:
                    table.popleft()


def _in_order(tables: Iterable[deque[_Row]], since_s: float) -> tuple[_Row, ...]:
    rows = [row for table in tables for row in table if row.time_s >= since_s]
    return tuple(sorted(rows, key=lambda row: row.time_s))
