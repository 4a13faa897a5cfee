"""An event loop with a simulated clock, for tests of timing: sleeps take no real time, and load cannot delay them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class SimulatedClock(asyncio.SelectorEventLoop):
    """An event loop that jumps to the next timer when no task is ready. `now_s` may also be set by the test."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__()

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now_s = max(self.now_s, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run_simulated(test: Callable[[SimulatedClock], Coroutine[Any, Any, None]]) -> None:
    """Run `test` to its end on a new loop with a simulated clock, which starts at 0."""
    clock = SimulatedClock()
    try:
        clock.run_until_complete(test(clock))
    finally:
        clock.close()
