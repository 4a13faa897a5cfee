"""Polls every node for its state and telemetry, keeps the last minutes of both, and tells when one hangs.

Judges no numbers and changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from resplit.errors import NodeLostError
from resplit.wire.peers import Peer

_log = structlog.get_logger(__name__)
PERIOD_S = 1.0
KEEP_S = 600.0
# A node that has not answered for so long hangs, though its connections stand. Less would take busy for dead.
HANGS_AFTER_S = 2.0


class Monitor:
    """Telemetry rows of all nodes (`TABLES` of resplit.telemetry) in order of arrival, and each node's newest state."""

    def __init__(self, peers: Mapping[str, Peer], on_hang: Callable[[str], None] = lambda node: None) -> None:
        self._peers = peers
        self._on_hang = on_hang
        self._last: dict[str, int] = {}
        self._rows: dict[str, deque[dict[str, Any]]] = {"nodes": deque(), "links": deque(), "blocks": deque()}
        self.states: dict[str, dict[str, Any]] = {}
        self.silent: set[str] = set()

    async def run(self) -> None:
        """Poll every node, each at its own pace, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._peers:
                tasks.create_task(self._watch(name), name=f"watch {name}")

    async def _watch(self, name: str) -> None:
        while True:
            await self.poll(name)
            self._forget(time.time() - KEEP_S)
            await asyncio.sleep(PERIOD_S)

    async def poll(self, name: str) -> None:
        """Ask one node now; one that does not answer is `silent` until it does."""
        try:
            body, last = await self._peers[name].report(self._last.get(name, 0), HANGS_AFTER_S)
        except NodeLostError as error:
            if name not in self.silent:
                _log.warning("a node is silent", node=name, error=str(error))
                self._on_hang(name)
            self.silent.add(name)
            self._last[name] = 0  # a node that comes back counts anew
            return
        self.silent.discard(name)
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
