"""Runs passes on the engine in one thread, times every block, and measures how busy the node is."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from resplit.errors import ResplitError
from resplit.model.activation import Activation
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.sampling import sample
from resplit.node.attempts import Attempts
from resplit.node.emulation import Hardware, Padding
from resplit.node.memory import Memory
from resplit.types import Sampling

Result = TypeVar("Result")


@dataclass(frozen=True)
class SegmentPass:
    """One pass of a session through blocks `first..last`; `sampling` is set if the last of them is the head.

    `start` is the position of the first token, `capacity` the number of tokens that the session may cache.
    """

    session: str
    first: int
    last: int
    start: int
    capacity: int
    values: Activation
    sampling: Sampling | None
    attempt: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in this pass: `values` is (1, tokens) or (1, tokens, width). 0 for a malformed tensor."""
        return self.values.shape[1] if len(self.values.shape) > 1 else 0

    @property
    def decoding(self) -> bool:
        """Whether this is a decode step, not a prefill."""
        return self.start > 0 and self.tokens == 1


@dataclass(frozen=True)
class Timing:
    """Node time of one block in one pass, without the time that background load added."""

    block: int
    phase: str
    tokens: int
    context_tokens: int
    seconds: float


class Executor:
    """The engine, its thread, the accounting of its memory, and the attempts of its sessions.

    `hardware` is None on real hardware. Passes run one at a time in the thread. Loading blocks, transferring caches
    and ending sessions run in other threads, so that they need not wait for the passes of other sessions.
    """

    def __init__(
        self, engine: Engine[Any], memory_bytes: float, hardware: Hardware | None, kv_tokens: float = 0.0
    ) -> None:
        self.engine = engine
        self.hardware = hardware
        self.memory = Memory(engine, memory_bytes, kv_tokens)
        self.attempts = Attempts()
        self.background_utilization = 0.0  # of real hardware; updated by the probe
        self.busy_s = 0.0
        self.errors: deque[float] = deque(maxlen=4096)  # relative errors of padded passes
        self.timings: deque[Timing] = deque(maxlen=4096)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="executor")
        self._passes = 0
        self._current: tuple[str, Future[None]] | None = None  # session and end of the running pass

    async def run(self, work: SegmentPass) -> Activation | int:
        """Run a pass. Returns its activations, or the sampled token if it ran the head.

        CommandRefusedError for a session that has ended or an old attempt; CapacityError if its caches do not fit;
        DataError for values or positions that do not match what is held.
        """
        return await self._in_thread(self._run, work)

    async def node_s(self, work: SegmentPass) -> float:
        """Run a pass. Returns its node time in seconds, without the time that background load added."""
        return await self._in_thread(self._node_s, work)

    def close(self) -> None:
        """Stop the thread after the running pass."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def load(self, block: int, tensors: bytes) -> None:
        """Load a block unless it is loaded; CapacityError if it does not fit."""
        if block not in self.engine.blocks:
            self.memory.ensure_block(block)
            self.engine.load(block, tensors)

    def take_cache(
        self, session: str, block: int, first: int, capacity: int, part: Activation, attempt: int = 0
    ) -> None:
        """Store a part of a session's cache of a block; CapacityError if the cache does not fit."""
        self.attempts.ensure_current(session, attempt)
        self.memory.ensure_cache(session, block, capacity)
        self.engine.import_cache(session, block, first, capacity, part)

    async def begin_attempt(self, session: str, attempt: int) -> dict[int, int]:
        """Refuse earlier attempts. Returns the cached positions by block, once no earlier pass can change them."""
        self.attempts.ensure_current(session, attempt)
        running = self._current
        if running and running[0] == session:
            await asyncio.wrap_future(running[1])
        return self.engine.lengths(session)

    def sessions(self) -> set[str]:
        """Sessions that hold a cache here or were tried again."""
        return self.engine.sessions() | self.attempts.sessions()

    def end(self, session: str) -> None:
        """Free a session's caches, and refuse its messages from now on."""
        self.engine.close(session)
        self.attempts.end(session)

    @property
    def _background(self) -> float:
        return self.hardware.background_utilization if self.hardware else self.background_utilization

    async def _in_thread(self, function: Callable[[SegmentPass], Result], work: SegmentPass) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, work)

    def _node_s(self, work: SegmentPass) -> float:
        before_s = self.busy_s
        self._run(work)
        return self.busy_s - before_s

    def _run(self, work: SegmentPass) -> Activation | int:
        begun_s = time.perf_counter()
        done: Future[None] = Future()
        # Set before the check: a new attempt is either seen by this pass, or sees the pass and waits for it.
        self._current = work.session, done
        try:
            self.attempts.ensure_current(work.session, work.attempt)
            self.memory.ensure_caches(work.session, work.first, work.last, work.capacity)
            return self._timed(work, begun_s)
        finally:
            self.busy_s += (time.perf_counter() - begun_s) * (1 - self._background)
            if self.attempts.has_ended(work.session):  # during this pass, which may have created caches again
                self.engine.close(work.session)
            self._current = None
            done.set_result(None)

    def _timed(self, work: SegmentPass, begun_s: float) -> Activation | int:
        """Run the pass, padded on emulated hardware, and keep timings of its blocks."""
        padding = Padding(self.hardware, self.errors) if self.hardware else None
        ends_s = [begun_s]

        def after_block(block: int) -> None:
            if padding:
                padding.after_block(self.engine.kinds[block], work.tokens, work.decoding)
            ends_s.append(time.perf_counter())

        rows = SessionRows(work.session, work.start, work.capacity, work.values)
        (values,) = self.engine.run(work.first, work.last, [rows], after_block)
        if isinstance(values, ResplitError):
            raise values
        token = None
        if work.sampling is not None:
            token = sample(values, work.sampling, work.start + work.tokens - 1)
        if padding:
            padding.finish()
        self._record(work, ends_s)
        return values if token is None else token

    def _record(self, work: SegmentPass, ends_s: list[float]) -> None:
        """Keep the timing of one block of each kind, a different one in each pass: blocks of a kind take equal times.

        Block `first + i` ran from `ends_s[i]` to `ends_s[i + 1]`.
        """
        kinds: dict[str, list[int]] = {}
        for block in range(work.first, work.last + 1):
            kinds.setdefault(self.engine.kinds[block], []).append(block)
        phase = "decode" if work.decoding else "prefill"
        for blocks in kinds.values():
            index = blocks[self._passes % len(blocks)] - work.first
            seconds = (ends_s[index + 1] - ends_s[index]) * (1 - self._background)
            self.timings.append(Timing(work.first + index, phase, work.tokens, work.start, seconds))
        self._passes += 1
