"""The agenda of a simulation: what happens next. Simulated time passes here and nowhere else."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

__all__ = ["Agenda"]


class Agenda:
    """Events in order of time; those of one time in the order in which they were added. `now_s` is the clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []  # a heap
        self._numbers = itertools.count()

    def at(self, time_s: float, act: Callable[..., object], *given: Any) -> None:
        """Call `act(*given)` at `time_s`, which must not be in the past."""
        heapq.heappush(self._events, (time_s, next(self._numbers), act, given))

    def after(self, delay_s: float, act: Callable[..., object], *given: Any) -> None:
        """Call `act(*given)` so many seconds from now."""
        self.at(self.now_s + delay_s, act, *given)

    def run(self, until_s: float = math.inf) -> None:
        """Let everything happen that is due by `until_s`; the clock then shows the time of the last event."""
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, act, given = heapq.heappop(events)
            act(*given)
