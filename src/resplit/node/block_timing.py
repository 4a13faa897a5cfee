"""Capacity profiling of one block: prefill and decode passes of several lengths, run by the node's own executor."""

from __future__ import annotations

import statistics

from resplit.node.batching import SegmentPass
from resplit.node.executor import Executor

_PREFILL_TOKENS = (8, 32, 64)
_CONTEXTS = (16, 48, 96, 192)
# Sessions and context of decode steps that share a pass. With steps of one session alone, the part of a pass that
# sessions share could not be told from the part of each.
_SHARED = ((4, 16), (8, 16))


async def time_block(executor: Executor, block: int, repeats: int = 2) -> float:
    """Run passes of a loaded block. Returns the median time of a decode step of one session in seconds.

    The executor records the timings of all passes as usual.
    """
    decodes: list[float] = []
    for _ in range(repeats):
        for tokens in _PREFILL_TOKENS:
            await _pass_s(executor, block, _names(1), 0, tokens, tokens)
            _close(executor, _names(1))
        decodes += [await _decode_s(executor, block, _names(1), context) for context in _CONTEXTS]
        for sessions, context in _SHARED:
            await _decode_s(executor, block, _names(sessions), context)
    return statistics.median(decodes)


async def _decode_s(executor: Executor, block: int, sessions: list[str], context: int) -> float:
    """The seconds of a decode step that `sessions` share, after `context` cached tokens each."""
    for session in sessions:
        await _pass_s(executor, block, [session], 0, context, context + 1)
    seconds = await _pass_s(executor, block, sessions, context, 1, context + 1)
    _close(executor, sessions)
    return seconds


async def _pass_s(executor: Executor, block: int, sessions: list[str], start: int, tokens: int, capacity: int) -> float:
    values = executor.engine.blank_input(block, tokens)
    works = [SegmentPass(session, block, block, start, capacity, values, None) for session in sessions]
    return await executor.shared_pass_s(works)


def _close(executor: Executor, sessions: list[str]) -> None:
    for session in sessions:
        executor.engine.close(session)


def _names(sessions: int) -> list[str]:
    return [f"profile {number}" for number in range(sessions)]
