"""Capacity profiling of one block: prefill and decode passes of several lengths, run by the node's own executor."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from resplit.node.batching import SegmentPass
from resplit.node.executor import Executor

_PREFILL_TOKENS = (8, 32, 64)
_CONTEXTS = (16, 48, 96, 192)
# Sessions and context of decode steps that share a pass. With steps of one session alone, the part of a pass that
# sessions share could not be told from the part of each.
_SHARED = ((4, 16), (8, 16))
# Most processors have smaller caches. A pass through a whole model finds each block's weights in memory, because the
# other blocks have displaced them. A block that runs again and again finds them in the cache, several times as fast.
_CACHE_BYTES = 64 * 2**20


async def time_block(executor: Executor, block: int, repeats: int = 2) -> float:
    """Run passes of a loaded block. Returns the median time of a decode step of one session in seconds.

    The executor records the timings of all passes as usual. On real hardware each pass reads the weights from memory.
    """
    emulated = executor.hardware is not None
    return await _Timing(executor, block, _nothing if emulated else displacing()).decode_s(repeats)


def displacing() -> Callable[[], Awaitable[object]]:
    """What displaces everything else from the processor's caches, each time that it is awaited."""
    others = np.ones(_CACHE_BYTES // 8)
    return lambda: asyncio.to_thread(others.sum)


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Timing:
    """Passes of one block. `before_pass` is awaited before each of them."""

    executor: Executor
    block: int
    before_pass: Callable[[], Awaitable[object]]

    async def decode_s(self, repeats: int) -> float:
        """Time passes of all kinds. Returns the median of decode steps of one session in seconds."""
        decodes: list[float] = []
        for _ in range(repeats):
            for tokens in _PREFILL_TOKENS:
                await self._pass_s(_names(1), 0, tokens, tokens)
                self._close(_names(1))
            decodes += [await self._step_s(_names(1), context) for context in _CONTEXTS]
            for sessions, context in _SHARED:
                await self._step_s(_names(sessions), context)
        return statistics.median(decodes)

    async def _step_s(self, sessions: list[str], context: int) -> float:
        """The seconds of a decode step that `sessions` share, after `context` cached tokens each."""
        for session in sessions:
            await self._pass_s([session], 0, context, context + 1)
        seconds = await self._pass_s(sessions, context, 1, context + 1)
        self._close(sessions)
        return seconds

    async def _pass_s(self, sessions: list[str], start: int, tokens: int, capacity: int) -> float:
        values = self.executor.engine.blank_input(self.block, tokens)
        works = [SegmentPass(name, self.block, self.block, start, capacity, values, None) for name in sessions]
        await self.before_pass()
        return await self.executor.shared_pass_s(works)

    def _close(self, sessions: list[str]) -> None:
        for session in sessions:
            self.executor.engine.close(session)


def _names(sessions: int) -> list[str]:
    return [f"profile {number}" for number in range(sessions)]
