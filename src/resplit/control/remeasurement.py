"""Has nodes measure again what the detector doubts, so that it soon knows whether a node or a link has changed.

When and how often is said in `control.repeated_measurements`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from resplit.control.repeated_measurements import PAUSE_S, SETTLE_S, Link, RepeatedMeasurements, Series
from resplit.process.cancellation import VitalTasks


class Remeasurement:
    """Measures the nodes and links of one cluster again. `measure` has nodes measure links, and report.

    `doubted` are the links that the detector doubts now.
    """

    def __init__(self, doubted: Callable[[], Sequence[Link]], tasks: VitalTasks) -> None:
        self.measure: Callable[[Sequence[Link]], Coroutine[Any, Any, None]] = _measure_nothing
        self._doubted = doubted
        self._tasks = tasks
        self._measurements = RepeatedMeasurements()
        self._under_way: set[asyncio.Task[None]] = set()

    def of_node(self, node: str) -> None:
        """Have a node report now, unless it was asked a moment ago."""
        if self._measurements.ask(node, asyncio.get_running_loop().time()):
            self._tasks.spawn(self.measure([(node, node)]), f"measure {node}")

    def of_links(self, links: Sequence[Link]) -> None:
        """Measure links now, unless that is under way, and again while they are doubted."""
        if series := self._measurements.begin(links):
            task = self._tasks.spawn(self._measure_repeatedly(series), "measure links")
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def until_doubts_end(self, changed: asyncio.Event) -> None:
        """Wait while links are measured and any is doubted, but not long, and not once `changed` is set."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while self._under_way and not changed.is_set() and self._doubted():
                    change = asyncio.create_task(changed.wait())
                    try:
                        await asyncio.wait({*self._under_way, change}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        change.cancel()

    async def _measure_repeatedly(self, series: Series) -> None:
        try:
            while not series.is_over:
                await self.measure(series.left)
                series.measured(set(self._doubted()))
                if series.left:  # also after the last one, before the same links can be in a new series
                    await asyncio.sleep(PAUSE_S)
        finally:
            self._measurements.end(series)


async def _measure_nothing(links: Sequence[Link]) -> None:
    pass
