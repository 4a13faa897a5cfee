"""What is doubted is measured again: links some times with pauses, a node once in a while. A move waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from resplit.control.looks import BETWEEN_LOOKS_S, LOOKS, MEASURED_AGAIN_S, SETTLE_S, Looks
from resplit.process.cancellation import VitalTasks
from tests.support.simulated_clock import SimulatedClock, run_simulated

AB, BA, AC = ("a", "b"), ("b", "a"), ("a", "c")
Link = tuple[str, str]


class Bench:
    """Looks on a simulated clock. A measurement takes `takes_s`; `measured` has when each began, and its links."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.tasks = VitalTasks()
        self.doubted: list[Link] = []
        self.takes_s = 0.0
        self.measured: list[tuple[float, list[Link]]] = []
        self.looks = Looks(lambda: self.doubted, self.tasks)
        self.looks.measure = self._measure
        self.changed = asyncio.Event()

    async def _measure(self, links: Sequence[Link]) -> None:
        self.measured.append((round(self.clock.now_s, 6), list(links)))
        await asyncio.sleep(self.takes_s)

    async def waited_s(self) -> float:
        begun_s = self.clock.now_s
        await self.looks.until_doubts_end(self.changed)
        return round(self.clock.now_s - begun_s, 6)


def looking(scenario: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
    async def run(clock: SimulatedClock) -> None:
        bench = Bench(clock)
        await scenario(bench)
        await bench.tasks.stop()

    return lambda: run_simulated(run)


@looking
async def test_links_that_are_not_doubted_any_more_are_measured_once(bench: Bench) -> None:
    bench.looks.at_links([AB, BA])
    await asyncio.sleep(10)
    assert bench.measured == [(0.0, [AB, BA])]


@looking
async def test_links_that_stay_in_doubt_are_measured_some_times_with_pauses(bench: Bench) -> None:
    bench.doubted = [AB, AC]
    bench.looks.at_links([AB, BA])
    await asyncio.sleep(10)
    first, *others = bench.measured
    assert first == (0.0, [AB, BA])
    assert others == [(round(look * BETWEEN_LOOKS_S, 6), [AB]) for look in range(1, LOOKS)]


@looking
async def test_a_link_is_looked_at_once_at_a_time(bench: Bench) -> None:
    bench.takes_s = 1.0
    bench.looks.at_links([AB])
    bench.looks.at_links([AB])
    bench.looks.at_links([])
    bench.looks.at_links([AB, AC])
    await asyncio.sleep(2)
    bench.looks.at_links([AB])
    await asyncio.sleep(2)
    assert bench.measured == [(0.0, [AB]), (0.0, [AC]), (2.0, [AB])]


@looking
async def test_a_node_reports_at_once_but_not_again_within_a_moment(bench: Bench) -> None:
    bench.looks.at_node("a")
    await asyncio.sleep(MEASURED_AGAIN_S / 2)
    bench.looks.at_node("a")
    bench.looks.at_node("b")
    await asyncio.sleep(MEASURED_AGAIN_S / 2)
    bench.looks.at_node("a")
    await asyncio.sleep(1)
    half_s = round(MEASURED_AGAIN_S / 2, 6)
    assert bench.measured == [(0.0, [("a", "a")]), (half_s, [("b", "b")]), (2 * half_s, [("a", "a")])]


@looking
async def test_without_a_look_or_without_a_doubt_nothing_is_waited_for(bench: Bench) -> None:
    bench.doubted = [AB]
    assert await bench.waited_s() == 0.0
    bench.doubted, bench.takes_s = [], 1.0
    bench.looks.at_links([AB])
    assert await bench.waited_s() == 0.0


@looking
async def test_the_looks_are_waited_for_while_a_link_is_doubted(bench: Bench) -> None:
    bench.doubted, bench.takes_s = [AB, AC], 0.1
    bench.looks.at_links([AB])
    await asyncio.sleep(0.05)
    bench.looks.at_links([AC])
    asyncio.get_running_loop().call_later(0.2, bench.doubted.remove, AB)
    asyncio.get_running_loop().call_later(0.28, bench.doubted.remove, AC)
    assert await bench.waited_s() == 0.3  # AC is measured from 0.05 to 0.15 s, and again until 0.35 s


@looking
async def test_looks_are_not_waited_for_longer_than_a_moment(bench: Bench) -> None:
    bench.doubted, bench.takes_s = [AB], 60.0
    bench.looks.at_links([AB])
    assert await bench.waited_s() == SETTLE_S


@looking
async def test_a_change_ends_the_wait(bench: Bench) -> None:
    bench.doubted, bench.takes_s = [AB], 60.0
    bench.looks.at_links([AB])
    asyncio.get_running_loop().call_later(0.25, bench.changed.set)
    assert await bench.waited_s() == 0.25
    assert await bench.waited_s() == 0.0
