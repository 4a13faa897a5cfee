"""Capacity profiling of one block: prefill and decode passes of several lengths, run by the node's own executor."""

from __future__ import annotations

import statistics

from resplit.node.batching import SegmentPass
from resplit.node.executor import Executor

_SESSION = "profile"
_PREFILL_TOKENS = (8, 32, 64)
_CONTEXTS = (16, 48, 96, 192)


async def time_block(executor: Executor, block: int, repeats: int = 2) -> float:
    """Run passes of a loaded block. Returns the median time of a decode step in seconds.

    The executor records the timings of all passes as usual.
    """
    decodes: list[float] = []
    for _ in range(repeats):
        for tokens in _PREFILL_TOKENS:
            await _run(executor, block, 0, tokens)
        for context in _CONTEXTS:
            await _run(executor, block, 0, context)
            decodes.append(await _run(executor, block, context, 1))
    executor.engine.close(_SESSION)
    return statistics.median(decodes)


async def _run(executor: Executor, block: int, start: int, tokens: int) -> float:
    capacity = max(_CONTEXTS) + 1
    values = executor.engine.blank_input(block, tokens)
    return await executor.node_s(SegmentPass(_SESSION, block, block, start, capacity, values, None))
