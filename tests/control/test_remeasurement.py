"""What is doubted is measured again: links some times with pauses, a node once in a while. A move waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from resplit.control.remeasurement import Remeasurement
from resplit.control.repeated_measurements import MEASURED_AGAIN_S, MOST_MEASUREMENTS, PAUSE_S, SETTLE_S
from resplit.process.cancellation import VitalTasks
from tests.support.simulated_clock import SimulatedClock, run_simulated

AB, BA, AC = ("a", "b"), ("b", "a"), ("a", "c")
Link = tuple[str, str]


class Bench:
    """On a simulated clock, a measurement takes `takes_s`. `measured` has when each began, and its links."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.tasks = VitalTasks()
        self.doubted: list[Link] = []
        self.takes_s = 0.0
        self.measured: list[tuple[float, list[Link]]] = []
        self.remeasurement = Remeasurement(lambda: self.doubted, self.tasks)
        self.remeasurement.measure = self._measure
        self.changed = asyncio.Event()

    async def _measure(self, links: Sequence[Link]) -> None:
        self.measured.append((round(self.clock.now_s, 6), list(links)))
        await asyncio.sleep(self.takes_s)

    async def waited_s(self) -> float:
        begun_s = self.clock.now_s
        await self.remeasurement.until_doubts_end(self.changed)
        return round(self.clock.now_s - begun_s, 6)


def measuring(scenario: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
    async def run(clock: SimulatedClock) -> None:
        bench = Bench(clock)
        await scenario(bench)
        await bench.tasks.stop()

    return lambda: run_simulated(run)


@measuring
async def test_links_that_are_not_doubted_any_more_are_measured_once(bench: Bench) -> None:
    bench.remeasurement.of_links([AB, BA])
    await asyncio.sleep(10)
    assert bench.measured == [(0.0, [AB, BA])]


@measuring
async def test_links_that_stay_in_doubt_are_measured_some_times_with_pauses(bench: Bench) -> None:
    bench.doubted = [AB, AC]
    bench.remeasurement.of_links([AB, BA])
    await asyncio.sleep(10)
    first, *others = bench.measured
    assert first == (0.0, [AB, BA])
    assert others == [(round(number * PAUSE_S, 6), [AB]) for number in range(1, MOST_MEASUREMENTS)]


@measuring
async def test_a_link_is_measured_once_at_a_time(bench: Bench) -> None:
    bench.takes_s = 1.0
    bench.remeasurement.of_links([AB])
    bench.remeasurement.of_links([AB])
    bench.remeasurement.of_links([])
    bench.remeasurement.of_links([AB, AC])
    await asyncio.sleep(2)
    bench.remeasurement.of_links([AB])
    await asyncio.sleep(2)
    assert bench.measured == [(0.0, [AB]), (0.0, [AC]), (2.0, [AB])]


@measuring
async def test_a_node_reports_at_once_but_not_again_within_a_moment(bench: Bench) -> None:
    bench.remeasurement.of_node("a")
    await asyncio.sleep(MEASURED_AGAIN_S / 2)
    bench.remeasurement.of_node("a")
    bench.remeasurement.of_node("b")
    await asyncio.sleep(MEASURED_AGAIN_S / 2)
    bench.remeasurement.of_node("a")
    await asyncio.sleep(1)
    half_s = round(MEASURED_AGAIN_S / 2, 6)
    assert bench.measured == [(0.0, [("a", "a")]), (half_s, [("b", "b")]), (2 * half_s, [("a", "a")])]


@measuring
async def test_without_a_measurement_or_without_a_doubt_nothing_is_waited_for(bench: Bench) -> None:
    bench.doubted = [AB]
    assert await bench.waited_s() == 0.0
    bench.doubted, bench.takes_s = [], 1.0
    bench.remeasurement.of_links([AB])
    assert await bench.waited_s() == 0.0


@measuring
async def test_measurements_are_waited_for_while_a_link_is_doubted(bench: Bench) -> None:
    bench.doubted, bench.takes_s = [AB, AC], 0.1
    bench.remeasurement.of_links([AB])
    await asyncio.sleep(0.05)
    bench.remeasurement.of_links([AC])
    asyncio.get_running_loop().call_later(0.2, bench.doubted.remove, AB)
    asyncio.get_running_loop().call_later(0.28, bench.doubted.remove, AC)
    assert await bench.waited_s() == 0.3  # AC is measured from 0.05 to 0.15 s, and again until 0.35 s


@measuring
async def test_measurements_are_not_waited_for_longer_than_a_moment(bench: Bench) -> None:
    bench.doubted, bench.takes_s = [AB], 60.0
    bench.remeasurement.of_links([AB])
    assert await bench.waited_s() == SETTLE_S


@measuring
async def test_a_change_ends_the_wait(bench: Bench) -> None:
    bench.doubted, bench.takes_s = [AB], 60.0
    bench.remeasurement.of_links([AB])
    asyncio.get_running_loop().call_later(0.25, bench.changed.set)
    assert await bench.waited_s() == 0.25
    assert await bench.waited_s() == 0.0
