"""The results of a pass on an executor, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from resplit.node.batching import SegmentPass
from resplit.node.executor import Executor
from resplit.node.pass_results import Follow, PassResult, nothing_follows


async def results_of(
    executor: Executor, work: SegmentPass, follow: Follow = nothing_follows
) -> AsyncGenerator[PassResult]:
    """Run a pass and those that follow it; leave them when the iterator is closed."""
    results: asyncio.Queue[PassResult | Exception] = asyncio.Queue()
    caller = executor.submit(work, results.put_nowait, follow)
    try:
        while True:
            result = await results.get()
            if isinstance(result, Exception):
                raise result
            yield result
            if result.is_last and not result.followed:
                return
    finally:
        executor.leave(caller)
