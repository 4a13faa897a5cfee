"""Capacity profiling of one block: prefill and decode passes of several lengths, run by the node's own executor."""

from __future__ import annotations

import statistics

from resplit.model.engine import Activation, token_ids
from resplit.node.executor import Executor, SegmentPass

_SESSION = "profile"
_PREFILL_TOKENS = (8, 32, 64)
_CONTEXTS = (16, 48, 96, 192)


async def time_block(executor: Executor, block: int, repeats: int = 2) -> float:
    """Run passes of a loaded block; the executor records their timings as usual. The median decode time, in seconds."""
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
    return await executor.node_s(
        SegmentPass(_SESSION, block, block, start, capacity, _values(executor, block, tokens), None)
    )


def _values(executor: Executor, block: int, tokens: int) -> Activation:
    """An input of the right shape. Times do not depend on its values."""
    engine = executor.engine
    if engine.kinds[block] == "embed":
        return token_ids([0] * tokens)
    return engine.blank(tokens)
