"""Runs passes on the engine in one thread, times every block, and counts how busy it was.

Knows nothing of routes and sockets. All access to the engine goes through its thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from resplit.errors import CapacityError, CommandRefusedError
from resplit.model.engine import Activation, TorchEngine
from resplit.node.emulation import Hardware, Padding
from resplit.types import Sampling

R = TypeVar("R")
_ENDED_REMEMBERED = 4096


@dataclass(frozen=True)
class Pass:
    """One pass of a session through blocks `first..last`; `sampling` is set where the last of them is the head."""

    session: str
    first: int
    last: int
    start: int
    capacity: int
    values: Activation
    sampling: Sampling | None


@dataclass(frozen=True)
class Timing:
    """Node time of one block in one pass, background aside."""

    block: int
    phase: str
    tokens: int
    context_tokens: int
    seconds: float


class Executor:
    """The engine's thread. `hardware` None is the real machine; `memory_bytes` bounds weights and caches together."""

    def __init__(self, engine: TorchEngine, memory_bytes: float, hardware: Hardware | None) -> None:
        self.engine = engine
        self.hardware = hardware
        self.memory_bytes = memory_bytes
        self.background_utilization = 0.0  # of the real machine; the probe keeps it
        self.busy_s = 0.0
        self.errors: deque[float] = deque(maxlen=4096)
        self.timings: deque[Timing] = deque(maxlen=4096)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="executor")
        self._passes = 0
        self._ended: dict[str, None] = {}  # the last sessions that ended, oldest first

    async def run(self, step: Pass) -> Activation | int:
        """The activations after the pass, or the sampled token where the head ran."""
        return await self._in_turn(self._run, step)

    async def node_s(self, step: Pass) -> float:
        """Run a pass; the node time that it took, background aside."""
        return await self._in_turn(self._node_s, step)

    def close(self) -> None:
        """Stop the thread after the pass that runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def load(self, block: int, tensors: bytes) -> None:
        """Load a block unless it is loaded; CapacityError where it does not fit. From any thread: passes go on."""
        if block in self.engine.blocks:
            return
        self._ensure_room(self.engine.features[block].weight_bytes, f"block {self.engine.chain.specs[block].name}")
        self.engine.load(block, tensors)

    def take_cache(self, session: str, block: int, first: int, capacity: int, part: Activation) -> None:
        """Put a part of a session's cache of a block in its place; CapacityError where it does not fit.

        In any thread: a session that moves must not wait behind the passes of others.
        """
        self._admit(session, block, block, capacity)
        self.engine.import_cache(session, block, first, capacity, part)

    def end(self, session: str) -> None:
        """Free a session's caches for good: what is still on its way for it is refused.

        In any thread, too: nothing should wait behind the passes of others in order to have less.
        """
        self.engine.close(session)
        self._ended[session] = None
        if len(self._ended) > _ENDED_REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _admit(self, session: str, first: int, last: int, capacity: int) -> None:
        """A session that has not ended, and whose caches fit."""
        if session in self._ended:
            raise CommandRefusedError("stale", f"session {session} has ended")
        more_bytes = self.engine.reserve(session, first, last, capacity)
        if more_bytes:
            self._ensure_room(more_bytes, f"the cache of session {session}")

    def _ensure_room(self, more_bytes: float, what: str) -> None:
        free_bytes = self.memory_bytes - self.engine.held_bytes
        if more_bytes > free_bytes:
            raise CapacityError(f"{what} needs {more_bytes / 2**20:.1f} MiB, {free_bytes / 2**20:.1f} MiB are free")

    def _node_s(self, step: Pass) -> float:
        before_s = self.busy_s
        self._run(step)
        return self.busy_s - before_s

    async def _in_turn(self, function: Callable[[Pass], R], step: Pass) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, step)

    def _run(self, step: Pass) -> Activation | int:
        begun_s = time.perf_counter()
        try:
            self._admit(step.session, step.first, step.last, step.capacity)
            return self._timed(step, begun_s)
        finally:
            elapsed_s = time.perf_counter() - begun_s
            background = self.hardware.background_utilization if self.hardware else self.background_utilization
            self.busy_s += elapsed_s * (1 - background)
            if step.session in self._ended:  # while the pass ran: it may have made caches again
                self.engine.close(step.session)

    def _timed(self, step: Pass, begun_s: float) -> Activation | int:
        tokens = step.values.shape[1] if len(step.values.shape) > 1 else 0  # (1, tokens) or (1, tokens, width)
        decoding = step.start > 0 and tokens == 1
        hardware = self.hardware
        padding = Padding(hardware, self.errors) if hardware else None
        elapsed: list[float] = []
        last_s = begun_s

        def after_block(block: int) -> None:
            nonlocal last_s
            if padding:
                padding.after_block(self.engine.kinds[block], tokens, decoding)
            now_s = time.perf_counter()
            elapsed.append(now_s - last_s)
            last_s = now_s

        values = self.engine.run(
            step.session, step.first, step.last, step.start, step.capacity, step.values, after_block
        )
        token = None if step.sampling is None else self.engine.sample(values, step.sampling, step.start + tokens - 1)
        if padding:
            padding.finish()
        self._record(step, tokens, decoding, elapsed)
        return values if token is None else token

    def _record(self, step: Pass, tokens: int, decoding: bool, elapsed: list[float]) -> None:
        """Keep the timing of one block of each kind in the pass, another one each time: they are alike."""
        background = self.hardware.background_utilization if self.hardware else self.background_utilization
        kinds: dict[str, list[int]] = {}
        for block in range(step.first, step.last + 1):
            kinds.setdefault(self.engine.kinds[block], []).append(block)
        for blocks in kinds.values():
            block = blocks[self._passes % len(blocks)]
            seconds = elapsed[block - step.first] * (1 - background)
            self.timings.append(Timing(block, "decode" if decoding else "prefill", tokens, step.start, seconds))
        self._passes += 1
