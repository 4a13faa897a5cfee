"""Capacity profiling of one block."""

from __future__ import annotations

import asyncio
import math

import pytest

from resplit.model.engine import TorchEngine
from resplit.model.source import StoredModel
from resplit.node.block_timing import time_block
from resplit.node.emulation import Hardware
from resplit.node.executor import Executor

SLOW = Hardware(decode_s={"layer": 2e-3}, prefill_s={"layer": 0.0})


@pytest.fixture
def executor(stored_model: StoredModel) -> Executor:
    engine = TorchEngine(stored_model.spec)
    engine.load(2, stored_model.tensors("layer.1"))
    return Executor(engine, math.inf, SLOW)


async def test_the_median_decode_time_is_returned_even_if_the_probe_takes_the_timings_meanwhile(
    executor: Executor,
) -> None:
    profiling = asyncio.create_task(time_block(executor, 2))
    taken = []
    while not profiling.done():
        await asyncio.sleep(0)
        while executor.timings:
            taken.append(executor.timings.popleft())
    assert 2e-3 <= profiling.result() < 20e-3
    assert {timing.phase for timing in taken} == {"prefill", "decode"}
    assert {timing.context_tokens for timing in taken if timing.phase == "decode"} == {16, 48, 96, 192}
    assert executor.engine.sessions() == set()
    executor.close()
