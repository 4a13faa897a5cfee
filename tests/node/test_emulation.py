"""Emulated hardware: passes take the declared time, and the error is recorded."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from resplit.config import BlockTimes, DecodeTimes, Emulation
from resplit.model.engines.base import Engine
from resplit.model.source import StoredModel
from resplit.node.batching import SegmentPass
from resplit.node.emulation import Hardware, Load, Padding, WakeDelay, median_error
from resplit.node.executor import Executor
from tests.support.engines import stored_engine
from tests.support.executor_results import results_of

HARDWARE = Hardware(
    fixed_s={"embed": 0.0, "layer": 0.0, "head": 0.0},
    session_s={"embed": 2e-3, "layer": 8e-3, "head": 12e-3},
    prefill_s={"embed": 0.1e-3, "layer": 0.5e-3, "head": 0.0},
)
LAYERS_S = 6 * 8e-3
SIMULATED_OVERHEAD_S = 5e-4  # each look at the clock takes a moment


@pytest.fixture(scope="module")
def engine(stored_model: StoredModel) -> Engine[Any]:
    """All blocks of the model: embed, six layers, head."""
    return stored_engine(stored_model)


@pytest.fixture
def executor(engine: Engine[Any]) -> Iterator[Executor]:
    executor = Executor(engine, math.inf, HARDWARE)
    yield executor
    engine.close("one")
    executor.close()


class SimulatedTime:
    """Replaces the module `time` in the node. Sleeps advance it at once, and each reading advances it a little."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.cpu_s = 0.0  # of the thread

    def thread_time(self) -> float:
        return self.cpu_s

    def perf_counter(self) -> float:
        self.now_s += 20e-6  # as if computing a block took this long
        return self.now_s

    def time(self) -> float:
        return 1e9 + self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def simulated_time(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    simulated = SimulatedTime()
    monkeypatch.setattr("resplit.node.emulation.time", simulated)
    monkeypatch.setattr("resplit.node.executor.time", simulated)
    return simulated


async def pass_s(executor: Executor, first: int, last: int, start: int, tokens: int) -> float:
    """Wall time of one pass of session "one" through blocks `first..last`."""
    begun_s = time.perf_counter()
    await run_pass(executor, first, last, start, tokens)
    return time.perf_counter() - begun_s


async def run_pass(executor: Executor, first: int, last: int, start: int, tokens: int) -> None:
    values = executor.engine.blank_input(first, tokens)
    async for _ in results_of(executor, SegmentPass("one", first, last, start, 128, values, None)):
        pass


async def decode_times_s(executor: Executor, first: int, last: int, passes: int) -> list[float]:
    """Wall times of decode steps, after a prefill of eight tokens."""
    await pass_s(executor, first, last, 0, 8)
    return [await pass_s(executor, first, last, 8 + step, 1) for step in range(passes)]


async def simulated_pass_s(
    clock: SimulatedTime, executor: Executor, first: int, last: int, start: int, tokens: int
) -> float:
    """The simulated time of one pass."""
    begun_s = clock.now_s
    await run_pass(executor, first, last, start, tokens)
    return clock.now_s - begun_s


@pytest.mark.parametrize(
    ("first", "last", "declared_s"),
    [(0, 7, 2e-3 + LAYERS_S + 12e-3), (1, 3, LAYERS_S / 2), (4, 7, LAYERS_S / 2 + 12e-3)],
    ids=["whole", "middle", "end"],
)
async def test_a_segment_takes_the_declared_time(
    simulated_time: SimulatedTime, executor: Executor, first: int, last: int, declared_s: float
) -> None:
    await run_pass(executor, first, last, 0, 8)
    decode_s = await simulated_pass_s(simulated_time, executor, first, last, 8, 1)
    assert decode_s == pytest.approx(declared_s, abs=SIMULATED_OVERHEAD_S)


async def test_a_prefill_takes_the_declared_time(simulated_time: SimulatedTime, executor: Executor) -> None:
    declared_s = 2e-3 + LAYERS_S + 12e-3 + 8 * (0.1e-3 + 6 * 0.5e-3)
    prefill_s = await simulated_pass_s(simulated_time, executor, 0, 7, 0, 8)
    assert prefill_s == pytest.approx(declared_s, abs=SIMULATED_OVERHEAD_S)


async def test_slowdown_and_background_load_lengthen_a_pass(simulated_time: SimulatedTime, executor: Executor) -> None:
    executor.hardware = HARDWARE.changed(slowdown=2.0, background_utilization=0.5)
    await run_pass(executor, 1, 3, 0, 8)
    slow_s = await simulated_pass_s(simulated_time, executor, 1, 3, 8, 1)
    assert slow_s == pytest.approx(4 * 24e-3, abs=SIMULATED_OVERHEAD_S)
    executor.hardware = executor.hardware.changed(slowdown=1.0, background_utilization=0.0)
    normal_s = await simulated_pass_s(simulated_time, executor, 1, 3, 9, 1)
    assert normal_s == pytest.approx(24e-3, abs=SIMULATED_OVERHEAD_S)


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
    assert all(timing.seconds >= 8e-3 - 1e-9 for timing in decodes)
    assert sum(timing.seconds for timing in executor.timings) <= wall_s / 2


async def test_a_late_wake_of_the_host_is_no_time_of_a_block(
    simulated_time: SimulatedTime, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = simulated_time.sleep
    monkeypatch.setattr(simulated_time, "sleep", lambda seconds: sleep(seconds + 3e-3))
    await run_pass(executor, 2, 2, 0, 8)
    for step in range(5):
        await run_pass(executor, 2, 2, 8 + step, 1)
    decodes = [timing.seconds for timing in executor.timings if timing.phase == "decode"]
    assert decodes == pytest.approx([8e-3] * 5, abs=SIMULATED_OVERHEAD_S)


async def test_real_hardware_is_not_padded(executor: Executor) -> None:
    executor.hardware = None
    times = await decode_times_s(executor, 0, 7, 10)
    assert statistics.median(times) < LAYERS_S
    assert not executor.errors
    assert math.isnan(median_error(executor.errors))


def test_a_pass_costs_a_fixed_time_and_a_time_for_each_prefill_token() -> None:
    prompt = Load(0, 16)
    assert HARDWARE.node_s("layer") == 8e-3
    assert HARDWARE.node_s("layer", prompt) == pytest.approx(8e-3 + 16 * 0.5e-3)
    halves = [HARDWARE.node_s(half, prompt) for half in ("attention", "mlp")]
    assert sum(halves) == pytest.approx(HARDWARE.node_s("layer", prompt))


def test_sessions_in_one_pass_share_its_fixed_part() -> None:
    shared = replace(HARDWARE, fixed_s={"layer": 6e-3}, session_s={"layer": 2e-3})
    assert shared.node_s("layer") == 8e-3
    assert shared.node_s("layer", Load(5, 0)) == pytest.approx(6e-3 + 5 * 2e-3)
    assert shared.node_s("layer", Load(5, 16)) == pytest.approx(6e-3 + 6 * 2e-3 + 16 * 0.5e-3)


def test_background_load_lengthens_the_elapsed_time_but_not_the_node_time() -> None:
    busy = HARDWARE.changed(None, background_utilization=0.75)
    assert busy.node_s("layer") == HARDWARE.node_s("layer")
    assert busy.elapsed_s("layer") == pytest.approx(4 * 8e-3)
    assert busy.changed(3.0, None) == replace(HARDWARE, slowdown=3.0, background_utilization=0.75)


def test_hardware_is_what_the_cluster_file_declares() -> None:
    times = DecodeTimes(embed="2 ms", layer="8 ms", head="12 ms")
    prefill = BlockTimes(embed="0.1 ms", layer="0.5 ms", head="0 ms")
    declared = Hardware.declared(
        Emulation(decode_per_token=times, prefill_per_token=prefill, background_utilization=0.25)
    )
    assert declared.prefill_s == HARDWARE.prefill_s
    assert declared.background_utilization == 0.25
    assert {kind: declared.node_s(kind) for kind in HARDWARE.session_s} == pytest.approx(HARDWARE.session_s)


def test_a_decode_time_may_have_a_part_that_sessions_share() -> None:
    shared, alone = {"fixed": "6 ms", "per_session": "2 ms"}, {"fixed": "0 ms", "per_session": "12 ms"}
    times = DecodeTimes.model_validate({"embed": "2 ms", "layer": shared, "head": alone})
    assert times.parts() == {"embed": (0.0, 2e-3), "layer": (6e-3, 2e-3), "head": (0.0, 12e-3)}


def test_one_decode_time_is_divided_as_the_real_engine_divides_its_own() -> None:
    parts = DecodeTimes.model_validate(dict.fromkeys(("embed", "layer", "head"), "10 ms")).parts()
    assert parts["embed"] == (0.0, 10e-3)  # a lookup: sessions share nothing
    assert parts["layer"] == parts["head"] == pytest.approx((7e-3, 3e-3))


def test_the_error_is_the_median_of_the_absolute_errors_of_passes() -> None:
    assert median_error(deque([0.01, -0.03, 0.02])) == 0.02


def test_the_error_is_known_while_passes_run() -> None:
    errors, stop = deque([0.1] * 4000, maxlen=4096), threading.Event()

    def add() -> None:
        while not stop.is_set():
            errors.append(0.1)

    adding, before_s = threading.Thread(target=add), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    adding.start()
    try:
        assert [median_error(errors) for _ in range(50)] == [0.1] * 50
    finally:
        stop.set()
        adding.join()
        sys.setswitchinterval(before_s)


def test_a_host_that_wakes_threads_late_makes_passes_no_longer(simulated_time: SimulatedTime) -> None:
    errors, wake_delay = deque[float](), WakeDelay()
    asleep = simulated_time.sleep
    simulated_time.sleep = lambda seconds: asleep(seconds + 0.001)  # type: ignore[method-assign]
    for _ in range(300):
        padding = Padding(HARDWARE, errors, wake_delay)
        padding.after_block("layer", Load(1, 0))
        padding.finish()
    assert errors[0] > 0.1
    assert errors[-1] == pytest.approx(0, abs=0.01)


def test_what_the_host_adds_is_no_time_of_the_device(simulated_time: SimulatedTime) -> None:
    errors: deque[float] = deque()
    padding = Padding(HARDWARE, errors, WakeDelay())
    padding.after_block("layer", Load(1, 0))
    simulated_time.now_s += 0.1  # the host does something else
    padding.after_block("layer", Load(1, 0))
    layer_s = HARDWARE.elapsed_s("layer")
    assert padding.finish() == pytest.approx([0.0, layer_s, 2 * layer_s])
    assert errors[0] > 1  # and the emulation says that it was late


def test_the_blocks_of_a_device_that_is_too_fast_for_its_host_are_late_in_equal_parts(
    simulated_time: SimulatedTime,
) -> None:
    padding = Padding(HARDWARE, deque(), WakeDelay())
    padding.after_block("embed", Load(1, 0))
    simulated_time.cpu_s += 0.04  # the next layer needs more than was declared for the whole pass
    simulated_time.now_s += 0.04
    padding.after_block("layer", Load(1, 0))
    padding.after_block("layer", Load(1, 0))
    ends_s = padding.finish()
    assert ends_s[-1] == pytest.approx(0.04)
    first_s, second_s, third_s = (after - before for before, after in itertools.pairwise(ends_s))
    assert second_s == pytest.approx(third_s)
    assert second_s / first_s == pytest.approx(4)
