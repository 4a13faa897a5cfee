"""Polls every node for its state and telemetry and keeps the last minutes of both; watches for nodes that hang.

Judges no numbers and changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from resplit.control.heartbeat import Heartbeats
from resplit.errors import NodeLostError
from resplit.wire.peers import Peer

PERIOD_S = 1.0
KEEP_S = 600.0
_ANSWER_WITHIN_S = 5.0


class Monitor:
    """Telemetry rows of all nodes (`TABLES` of resplit.telemetry) in order of arrival, and each node's newest state."""

    def __init__(self, peers: Mapping[str, Peer], on_hang: Callable[[str], None] = lambda node: None) -> None:
        self._peers = peers
        self._heartbeats = Heartbeats(peers, on_hang)
        self._last: dict[str, int] = {}
        self._rows: dict[str, deque[dict[str, Any]]] = {"nodes": deque(), "links": deque(), "blocks": deque()}
        self.states: dict[str, dict[str, Any]] = {}
        self._over = False

    def heard(self, name: str) -> None:
        """Note a sign of life of a node, whatever it was."""
        self._heartbeats.heard(name)

    async def run(self) -> None:
        """Poll every node, each at its own pace, those that come later too, and watch for silence, until cancelled."""
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
                self._over = True  # for one whose cancellation is lost in a call (see `resplit.cancellation`)

    async def _watch(self, name: str) -> None:
        while name in self._peers and not self._over:
            await self.poll(name)
            await asyncio.sleep(PERIOD_S)

    async def poll(self, name: str) -> None:
        """Ask one node now; of one that does not answer, what it said last stays."""
        peer = self._peers[name]
        try:
            body, last = await peer.report(self._last.get(name, 0), _ANSWER_WITHIN_S)
            if body["state"]["pid"] != self.states.get(name, body["state"])["pid"]:  # restarted: it counts anew
                body, last = await peer.report(0, _ANSWER_WITHIN_S)
        except NodeLostError:
            return
        self.heard(name)
        self._last[name] = last
        self.states[name] = body["state"]
        for table, rows in body["rows"].items():
            self._rows[table].extend(rows)

    def rows(self, since_s: float) -> dict[str, list[dict[str, Any]]]:
        """Rows not older than `since_s` (seconds since 1970), by table."""
        return {table: [row for row in rows if row["time_s"] >= since_s] for table, rows in self._rows.items()}

    def _forget(self, before_s: float) -> None:
        for rows in self._rows.values():
            while rows and rows[0]["time_s"] < before_s:
                rows.popleft()
