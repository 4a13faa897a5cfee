"""Emulated hardware: passes take the declared time, and the error is recorded."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

import pytest

from resplit.config import BlockTimes, Emulation
from resplit.model.engine import TorchEngine
from resplit.model.source import StoredModel
from resplit.node.emulation import Hardware, median_error
from resplit.node.executor import Executor, SegmentPass

HARDWARE = Hardware(
    decode_s={"embed": 2e-3, "layer": 8e-3, "head": 12e-3},
    prefill_s={"embed": 0.1e-3, "layer": 0.5e-3, "head": 0.0},
)
LAYERS_S = 6 * 8e-3


@pytest.fixture(scope="module")
def engine(stored_model: StoredModel) -> TorchEngine:
    """All blocks of the model: embed, six layers, head."""
    engine = TorchEngine(stored_model.spec)
    for index, block in enumerate(engine.chain.specs):
        engine.load(index, stored_model.tensors(block.name))
    return engine


@pytest.fixture
def executor(engine: TorchEngine) -> Iterator[Executor]:
    executor = Executor(engine, math.inf, HARDWARE)
    yield executor
    engine.close("one")
    executor.close()


async def pass_s(executor: Executor, first: int, last: int, start: int, tokens: int) -> float:
    """Wall time of one pass of session "one" through blocks `first..last`."""
    values = executor.engine.blank_input(first, tokens)
    begun_s = time.perf_counter()
    await executor.run(SegmentPass("one", first, last, start, 128, values, None))
    return time.perf_counter() - begun_s


async def decode_times_s(executor: Executor, first: int, last: int, passes: int) -> list[float]:
    """Wall times of decode steps, after a prefill of eight tokens."""
    await pass_s(executor, first, last, 0, 8)
    return [await pass_s(executor, first, last, 8 + step, 1) for step in range(passes)]


async def assert_median(times_s: Callable[[], Awaitable[list[float]]], declared_s: float) -> None:
    """The median is within 5 % of the declared time in one of six rounds: other load may disturb the rest."""
    for _ in range(6):
        median_s = statistics.median(await times_s())
        if abs(median_s / declared_s - 1) < 0.05:
            return
    pytest.fail(f"{median_s * 1e3:.2f} ms instead of {declared_s * 1e3:.2f} ms")


@pytest.mark.parametrize(
    ("first", "last", "declared_s"),
    [(0, 7, 2e-3 + LAYERS_S + 12e-3), (1, 3, LAYERS_S / 2), (4, 7, LAYERS_S / 2 + 12e-3)],
    ids=["whole", "middle", "end"],
)
async def test_a_segment_takes_the_declared_time(executor: Executor, first: int, last: int, declared_s: float) -> None:
    await assert_median(lambda: decode_times_s(executor, first, last, 15), declared_s)


async def test_a_prefill_takes_the_declared_time(executor: Executor) -> None:
    async def prefills() -> list[float]:
        return [await pass_s(executor, 0, 7, 0, 8) for _ in range(6)]

    await assert_median(prefills, 2e-3 + LAYERS_S + 12e-3 + 8 * (0.1e-3 + 6 * 0.5e-3))


async def test_slowdown_and_background_load_lengthen_a_pass(executor: Executor) -> None:
    executor.hardware = HARDWARE.changed(slowdown=2.0, background_utilization=0.5)
    await assert_median(lambda: decode_times_s(executor, 1, 3, 5), 4 * 24e-3)
    executor.hardware = executor.hardware.changed(slowdown=1.0, background_utilization=0.0)
    await assert_median(lambda: decode_times_s(executor, 1, 6, 10), LAYERS_S)


async def test_a_pass_is_never_shorter_than_declared_and_the_error_says_how_much_longer(executor: Executor) -> None:
    times = await decode_times_s(executor, 4, 7, 12)
    assert min(times) >= 36e-3
    _prefill, *decodes = executor.errors
    for error, time_s in zip(decodes, times, strict=True):  # the time includes the way to the executor's thread
        assert 0 < error <= time_s / 36e-3 - 1


async def test_timings_and_busy_time_exclude_background_load(executor: Executor) -> None:
    executor.hardware = HARDWARE.changed(None, background_utilization=0.5)
    begun_s = time.perf_counter()
    await decode_times_s(executor, 2, 2, 10)
    wall_s = time.perf_counter() - begun_s
    declared_s = 10 * 8e-3 + (8e-3 + 8 * 0.5e-3)
    assert declared_s <= executor.busy_s <= wall_s / 2
    decodes = [timing for timing in executor.timings if timing.phase == "decode"]
    assert [(t.block, t.tokens, t.context_tokens) for t in decodes] == [(2, 1, 8 + step) for step in range(10)]
    assert all(timing.seconds >= 8e-3 for timing in decodes)
    assert sum(timing.seconds for timing in executor.timings) <= wall_s / 2


async def test_real_hardware_is_not_padded(executor: Executor) -> None:
    executor.hardware = None
    times = await decode_times_s(executor, 0, 7, 10)
    assert statistics.median(times) < LAYERS_S
    assert not executor.errors
    assert math.isnan(median_error(executor.errors))


def test_a_pass_costs_a_fixed_time_and_a_time_for_each_prefill_token() -> None:
    assert HARDWARE.node_s("layer", 1, decoding=True) == 8e-3
    assert HARDWARE.node_s("layer", 16, decoding=False) == pytest.approx(8e-3 + 16 * 0.5e-3)
    halves = [HARDWARE.node_s(half, 16, decoding=False) for half in ("attention", "mlp")]
    assert sum(halves) == pytest.approx(HARDWARE.node_s("layer", 16, decoding=False))


def test_background_load_lengthens_the_elapsed_time_but_not_the_node_time() -> None:
    busy = HARDWARE.changed(None, background_utilization=0.75)
    assert busy.node_s("layer", 1, decoding=True) == HARDWARE.node_s("layer", 1, decoding=True)
    assert busy.elapsed_s("layer", 1, decoding=True) == pytest.approx(4 * 8e-3)
    assert busy.changed(3.0, None) == Hardware(HARDWARE.decode_s, HARDWARE.prefill_s, 3.0, 0.75)


def test_hardware_is_what_the_cluster_file_declares() -> None:
    times = BlockTimes(embed="2 ms", layer="8 ms", head="12 ms")
    prefill = BlockTimes(embed="0.1 ms", layer="0.5 ms", head="0 ms")
    declared = Hardware.declared(
        Emulation(decode_per_token=times, prefill_per_token=prefill, background_utilization=0.25)
    )
    assert declared == HARDWARE.changed(None, 0.25)


def test_the_error_is_the_median_of_the_absolute_errors_of_passes() -> None:
    assert median_error(deque([0.01, -0.03, 0.02])) == 0.02
