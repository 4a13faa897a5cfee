"""Capacity profiling of one block."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from resplit.model.engines import open_engine
from resplit.model.engines.base import Engine
from resplit.model.source import StoredModel
from resplit.node.batching import SegmentPass
from resplit.node.block_timing import time_block
from resplit.node.emulation import Hardware
from resplit.node.executor import Executor

SLOW = Hardware(fixed_s={"layer": 2e-3}, session_s={"layer": 0.0}, prefill_s={"layer": 0.0})


class RecordingExecutor(Executor):
    """An executor that also records the sessions, the start and the node time of each pass."""

    def __init__(self, engine: Engine[Any]) -> None:
        super().__init__(engine, math.inf, SLOW)
        self.passes: list[tuple[int, int, float]] = []

    async def shared_pass_s(self, works: Sequence[SegmentPass]) -> float:
        seconds = await super().shared_pass_s(works)
        self.passes.append((len(works), works[0].start, seconds))
        return seconds


@pytest.fixture
def executor(stored_model: StoredModel) -> Iterator[RecordingExecutor]:
    engine = open_engine(stored_model.spec)
    engine.load(2, stored_model.content("layer.1"))
    executor = RecordingExecutor(engine)
    yield executor
    executor.close()


async def test_the_median_decode_time_is_returned_even_if_the_probe_takes_the_timings_meanwhile(
    executor: RecordingExecutor,
) -> None:
    profiling = asyncio.create_task(time_block(executor, 2))
    taken = []
    while not profiling.done():
        await asyncio.sleep(0)
        while executor.timings:
            taken.append(executor.timings.popleft())
    decodes_s = [seconds for sessions, start, seconds in executor.passes if start > 0 and sessions == 1]
    assert profiling.result() == statistics.median(decodes_s)
    assert min(decodes_s) >= 2e-3  # the declared time; load can only make a pass longer
    assert {timing.phase for timing in taken} == {"prefill", "decode"}
    steps = {(timing.sessions, timing.context_tokens) for timing in taken if timing.phase == "decode"}
    assert steps == {(1, 16), (1, 48), (1, 96), (1, 192), (4, 16), (8, 16)}
    assert executor.engine.sessions() == set()
