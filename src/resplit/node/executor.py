"""Runs passes on the engine in one thread, times every block, and counts how busy it was.

Knows nothing of routes and sockets. All access to the engine goes through its thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from resplit.errors import CapacityError, CommandRefusedError
from resplit.model.engine import Activation, TorchEngine
from resplit.node.emulation import Hardware, Padding
from resplit.types import Sampling

R = TypeVar("R")
_ENDED_REMEMBERED = 4096


@dataclass(frozen=True)
class SegmentPass:
    """One pass of a session through blocks `first..last`; `sampling` is set where the last of them is the head."""

    session: str
    first: int
    last: int
    start: int
    capacity: int
    values: Activation
    sampling: Sampling | None
    attempt: int = 0


@dataclass(frozen=True)
class Timing:
    """Node time of one block in one pass, background aside."""

    block: int
    phase: str
    tokens: int
    context_tokens: int
    seconds: float


class Executor:
    """The engine's thread. `hardware` None is the real machine; `memory_bytes` bounds weights and caches together.

    Loaded blocks have room for `kv_tokens` cached tokens reserved: copies of caches take what is left beside that, and
    make way where anything else needs room.
    """

    def __init__(
        self, engine: TorchEngine, memory_bytes: float, hardware: Hardware | None, kv_tokens: float = 0.0
    ) -> None:
        self.engine = engine
        self.hardware = hardware
        self.memory_bytes = memory_bytes
        self._kv_tokens = kv_tokens
        self.expected: frozenset[int] = frozenset()  # blocks that are to be loaded: caches of them are no mere copies
        self.background_utilization = 0.0  # of the real machine; the probe keeps it
        self.busy_s = 0.0
        self.errors: deque[float] = deque(maxlen=4096)
        self.timings: deque[Timing] = deque(maxlen=4096)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="executor")
        self._passes = 0
        self._ended: dict[str, None] = {}  # the last sessions that ended, oldest first
        self._attempts: dict[str, int] = {}  # the newest that was seen of each session that was tried again
        self._lock = threading.Lock()
        self._current: tuple[str, Future[None]] | None = None  # the pass that runs

    async def run(self, step: SegmentPass) -> Activation | int:
        """The activations after the pass, or the sampled token where the head ran."""
        return await self._in_turn(self._run, step)

    async def node_s(self, step: SegmentPass) -> float:
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

    def take_cache(
        self, session: str, block: int, first: int, capacity: int, part: Activation, attempt: int = 0
    ) -> None:
        """Put a part of a session's cache of a block in its place; CapacityError where it does not fit.

        In any thread: a session that moves must not wait behind the passes of others.
        """
        self.ensure_current(session, attempt)
        if block in self.engine.blocks or block in self.expected:
            self._ensure_caches(session, block, block, capacity)
        else:
            self._ensure_room_for_copy(session, block, capacity)
        self.engine.import_cache(session, block, first, capacity, part)

    async def begin_attempt(self, session: str, attempt: int) -> dict[int, int]:
        """Refuse from now on what is of older attempts; the positions held by block, once no pass can change them."""
        self.ensure_current(session, attempt)
        running = self._current
        if running and running[0] == session:
            await asyncio.wrap_future(running[1])
        return self.engine.lengths(session)

    def ensure_current(self, session: str, attempt: int) -> None:
        """CommandRefusedError for a session that has ended, or an older attempt than was seen of it."""
        if session in self._ended:
            raise CommandRefusedError("stale", f"session {session} has ended")
        with self._lock:
            newest = self._attempts.get(session, 0)
            if attempt > newest:
                self._attempts[session] = attempt
        if attempt < newest:
            raise CommandRefusedError("stale", f"attempt {attempt} of session {session}; {newest} has begun")

    def copies(self) -> list[tuple[str, int, float]]:
        """Session, block and bytes of the caches of blocks that are not loaded here: copies, kept for others."""
        real = {*self.engine.blocks, *self.expected}
        return [copy for copy in self.engine.caches() if copy[1] not in real]

    def sessions(self) -> set[str]:
        """Sessions that something is known of here."""
        return self.engine.sessions() | set(self._attempts)

    def end(self, session: str) -> None:
        """Free a session's caches for good: what is still on its way for it is refused.

        In any thread, too: nothing should wait behind the passes of others in order to have less.
        """
        self.engine.close(session)
        self._attempts.pop(session, None)
        self._ended[session] = None
        if len(self._ended) > _ENDED_REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def _ensure_caches(self, session: str, first: int, last: int, capacity: int) -> None:
        more_bytes = self.engine.reserve(session, first, last, capacity)
        if more_bytes:
            self._ensure_room(more_bytes, f"the cache of session {session}")

    def _ensure_room_for_copy(self, session: str, block: int, capacity: int) -> None:
        """A copy takes no room that is reserved, and nobody else's."""
        engine = self.engine
        more_bytes = engine.reserve(session, block, block, capacity)
        reserved = sum(
            engine.features[b].weight_bytes + self._kv_tokens * engine.features[b].kv_bytes_per_token
            for b in engine.blocks
        )
        copies = sum(size for _, _, size in self.copies())
        if more_bytes > self.memory_bytes - reserved - copies:
            raise CapacityError(f"no room for a copy of the cache of session {session}")

    def _ensure_room(self, more_bytes: float, what: str) -> None:
        """Room under the ceiling; copies make way, the oldest first."""
        free_bytes = self.memory_bytes - self.engine.held_bytes
        for session, block, size in self.copies() if more_bytes > free_bytes else ():
            if more_bytes <= free_bytes:
                break
            self.engine.close(session, (block,))
            free_bytes += size
        if more_bytes > free_bytes:
            raise CapacityError(f"{what} needs {more_bytes / 2**20:.1f} MiB, {free_bytes / 2**20:.1f} MiB are free")

    def _node_s(self, step: SegmentPass) -> float:
        before_s = self.busy_s
        self._run(step)
        return self.busy_s - before_s

    async def _in_turn(self, function: Callable[[SegmentPass], R], step: SegmentPass) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, step)

    def _run(self, step: SegmentPass) -> Activation | int:
        begun_s = time.perf_counter()
        done: Future[None] = Future()
        # Before the check: a new attempt is seen by this pass, or sees it and waits for it.
        self._current = step.session, done
        try:
            self.ensure_current(step.session, step.attempt)
            self._ensure_caches(step.session, step.first, step.last, step.capacity)
            return self._timed(step, begun_s)
        finally:
            elapsed_s = time.perf_counter() - begun_s
            background = self.hardware.background_utilization if self.hardware else self.background_utilization
            self.busy_s += elapsed_s * (1 - background)
            if step.session in self._ended:  # while the pass ran: it may have made caches again
                self.engine.close(step.session)
            self._current = None
            done.set_result(None)

    def _timed(self, step: SegmentPass, begun_s: float) -> Activation | int:
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

    def _record(self, step: SegmentPass, tokens: int, decoding: bool, elapsed: list[float]) -> None:
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
