"""What a node measures of itself and of its links, as telemetry rows with running numbers.

On an emulated node it reports the hardware that is played. Knows nothing of routes or commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from typing import Any

import psutil

from resplit.errors import NodeLostError
from resplit.model.blocks import BlockSpec
from resplit.node.agent import Agent
from resplit.node.emulation import median_error
from resplit.node.executor import Timing
from resplit.wire.peers import Crossing, Peer

PERIOD_S = 1.0
_MOST_ALIKE = 8  # timings of one kind of block in one phase that are told of one period
# Small and large enough to tell latency from bandwidth, small enough not to fill an edge link.
_ECHO_BYTES = (64, 32 * 1024)


class Probe:
    """Collects rows; `rows_after` hands them out. `run` is the task that measures actively."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._rows: deque[tuple[int, str, dict[str, Any]]] = deque(maxlen=20_000)
        self._number = 0
        self._half_trip_s: dict[str, float] = {}
        self._reference_s = math.nan
        self._process = psutil.Process()
        # The first call of each has no earlier one to compare with.
        psutil.cpu_percent()
        self._process.cpu_percent()
        self._busy_s, self._sampled_s = 0.0, time.monotonic()
        agent.crossings = self.crossed

    def rows_after(self, number: int) -> tuple[dict[str, list[dict[str, Any]]], int]:
        """Rows numbered above `number`, by table, and the last number."""
        rows: dict[str, list[dict[str, Any]]] = {"nodes": [], "links": [], "blocks": []}
        for numbered, table, row in self._rows:
            if numbered > number:
                rows[table].append(row)
        return rows, self._number

    def crossed(self, crossing: Crossing) -> None:
        """Note an activation's way to a peer: its round trip less the way back of something small."""
        back_s = self._half_trip_s.get(crossing.peer)
        if back_s is not None and crossing.round_trip_s > back_s:
            self._link_row(crossing.peer, crossing.payload_bytes, crossing.round_trip_s - back_s, "passive")

    async def run(self) -> None:
        """Sample the node every period and its links in turn, until cancelled."""
        turn = 0
        while True:
            await asyncio.sleep(PERIOD_S)
            self.sample()
            peers = list(self._agent.peers.values())
            if peers:
                with contextlib.suppress(NodeLostError):
                    await self._echo(peers[turn % len(peers)])
                turn += 1

    async def echo_all(self, repeats: int = 3) -> None:
        """Measure every link now, several times; a peer that does not answer gives no rows."""
        for peer in self._agent.peers.values():
            with contextlib.suppress(NodeLostError):
                for _ in range(repeats):
                    await self._echo(peer)

    def note_reference(self, seconds: float) -> None:
        """The node's time for a decode step of the public reference layer."""
        self._reference_s = seconds

    def sample(self) -> None:
        """Add a row on the node, and some on the blocks that were timed, over the time since the last sample."""
        executor = self._agent.executor
        background, own = self._use()
        held = executor.engine.held_bytes if executor else 0.0
        free = self._agent.memory_bytes - held
        if not self._agent.hardware:
            free = min(free, float(psutil.virtual_memory().available))
        row = {
            "cpu_utilization": background + own,
            "own_utilization": own,
            "memory_free_bytes": max(0.0, free),
            "memory_held_bytes": held,
            "gpu_utilization": _gpu_utilization(),
            "reference_s": self._current_reference_s(),
        }
        self._add("nodes", row)
        if executor:
            timings = [executor.timings.popleft() for _ in range(len(executor.timings))]
            for row in some_of_each([_block_row(executor.engine.chain.specs, timing) for timing in timings]):
                self._add("blocks", row)

    def _use(self) -> tuple[float, float]:
        """Background and own utilisation since the last sample."""
        executor, hardware = self._agent.executor, self._agent.hardware
        now_s, busy_s = time.monotonic(), executor.busy_s if executor else 0.0
        own = (busy_s - self._busy_s) / max(now_s - self._sampled_s, 1e-3)
        self._busy_s, self._sampled_s = busy_s, now_s
        if hardware:
            # Passes that end within a period began before it: a sample may exceed what the node has.
            return hardware.background_utilization, min(own, 1 - hardware.background_utilization)
        cores = psutil.cpu_count() or 1
        own = min(1.0, self._process.cpu_percent() / 100 / cores)
        background = max(0.0, min(0.99, psutil.cpu_percent() / 100 - own))
        if executor:
            executor.background_utilization = background
        return background, own

    def state(self) -> dict[str, Any]:
        """What the node holds and does now."""
        agent = self._agent
        engine = agent.executor.engine if agent.executor else None
        copies = agent.executor.copies() if agent.executor else []
        return {
            "node": agent.name,
            "pid": self._process.pid,
            "trusted": agent.trusted,
            "emulated": agent.hardware is not None,
            "emulation_error": median_error(agent.executor.errors) if agent.executor and agent.hardware else None,
            "memory_bytes": agent.memory_bytes,
            "held_bytes": engine.held_bytes if engine else 0.0,
            "blocks": list(engine.blocks) if engine else [],
            "sessions": len(engine.sessions()) if engine else 0,
            "copies": sorted({block for _, block, _ in copies}),
            "copy_bytes": sum(size for _, _, size in copies),
            "epochs": sorted(agent.routes),
            "prepared": sorted(agent.prepared),
        }

    async def _echo(self, peer: Peer) -> None:
        small, large = _ECHO_BYTES
        half_s = await peer.echo_s(small) / 2
        self._half_trip_s[peer.name] = half_s
        self._link_row(peer.name, small, half_s, "active")
        self._link_row(peer.name, large, max(half_s, await peer.echo_s(large) - half_s), "active")

    def _link_row(self, peer: str, payload_bytes: int, seconds: float, source: str) -> None:
        self._add("links", {"peer": peer, "payload_bytes": payload_bytes, "seconds": seconds, "source": source})

    def _current_reference_s(self) -> float:
        hardware = self._agent.hardware
        return hardware.node_s("layer", 1, decoding=True) if hardware else self._reference_s

    def _add(self, table: str, row: dict[str, Any]) -> None:
        self._number += 1
        common = {"time_s": time.time(), "node": self._agent.name, "emulated": self._agent.hardware is not None}
        self._rows.append((self._number, table, common | row))


def some_of_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `_MOST_ALIKE` rows of each kind of block and phase, spread over the time.

    A busy node times hundreds of blocks a second, and whoever collects telemetry keeps minutes of it.
    """
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["kind"], row["phase"]), []).append(row)
    return [row for group in alike.values() for row in group[:: math.ceil(len(group) / _MOST_ALIKE)]]


def _block_row(specs: tuple[BlockSpec, ...], timing: Timing) -> dict[str, Any]:
    spec = specs[timing.block]
    return {
        "block": spec.name,
        "kind": spec.kind,
        "phase": timing.phase,
        "tokens": timing.tokens,
        "context_tokens": timing.context_tokens,
        "seconds": timing.seconds,
    }


def _gpu_utilization() -> float:
    import torch

    if not torch.cuda.is_available():
        return math.nan
    try:
        return torch.cuda.utilization() / 100
    except (ImportError, RuntimeError):  # without NVML nobody can tell
        return math.nan
