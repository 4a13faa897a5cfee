"""Measures again what the detector doubts, so that it soon knows whether a node or a link has changed."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from resplit.process.cancellation import VitalTasks

MEASURED_AGAIN_S = 0.3  # a node that is doubted reports at once, but not more often than this
# A link that is still doubted is measured so many times, with pauses: what delays one message has passed then.
MOST_MEASUREMENTS, PAUSE_S = 3, 0.1
# A move away from a link waits so long for what is known about others that are doubted. A radio that degrades takes all
# links of its node, one detected after the other, and a move to another of them would have to be undone.
SETTLE_S = 0.6
_Link = tuple[str, str]  # from one node to another; from a node to itself it stands for the node


class Remeasurement:
    """Measures the nodes and links of one cluster again. `measure` has nodes measure links, and report.

    `doubted` are the links that the detector doubts now.
    """

    def __init__(self, doubted: Callable[[], Sequence[_Link]], tasks: VitalTasks) -> None:
        self.measure: Callable[[Sequence[_Link]], Coroutine[Any, Any, None]] = _measure_nothing
        self._doubted = doubted
        self._tasks = tasks
        self._asked_s: dict[str, float] = {}  # by node
        self._links: set[_Link] = set()  # that are measured now
        self._under_way: set[asyncio.Task[None]] = set()

    def of_node(self, node: str) -> None:
        """Have a node report now, unless it was asked a moment ago."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._asked_s.get(node, -math.inf) + MEASURED_AGAIN_S:
            self._asked_s[node] = now_s
            self._tasks.spawn(self.measure([(node, node)]), f"measure {node}")

    def of_links(self, links: Sequence[_Link]) -> None:
        """Measure links now, unless that is under way, and again while they are doubted."""
        if new := [link for link in links if link not in self._links]:
            self._links.update(new)
            task = self._tasks.spawn(self._measure_repeatedly(new), "measure links")
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

    async def _measure_repeatedly(self, links: Sequence[_Link]) -> None:
        left = list(links)
        try:
            for _ in range(MOST_MEASUREMENTS):
                await self.measure(left)
                doubted = set(self._doubted())
                left = [link for link in left if link in doubted]
                if not left:
                    return
                await asyncio.sleep(PAUSE_S)
        finally:
            self._links.difference_update(links)


async def _measure_nothing(links: Sequence[_Link]) -> None:
    pass
