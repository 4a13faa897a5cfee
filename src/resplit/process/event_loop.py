"""The event loop of nodes and of the gateway: timers of 0.1 ms, and no bound on the number of descriptors.

It knows for how long it has kept messages waiting (`absent_s`), because it or its process was busy.
"""

from __future__ import annotations

import asyncio
import select
import selectors
import time
from asyncio import sslproto
from collections.abc import Coroutine
from typing import Any

from resplit.process.processor_wait import processor_wait_s

# asyncio keeps a read buffer of this size for each TLS connection, also for one whose handshake never ends. Its own
# 256 KiB would let strangers take 30 MiB of a small node.
sslproto.SSLProtocol.max_size = 64 * 1024


_COARSE_S = 0.002  # twice the error of epoll's own timeouts
_RECENT_S = 0.5


class FineEpollSelector(selectors.EpollSelector):
    """Waits for descriptors as epoll does, but not longer than a timeout that is exact to microseconds.

    epoll itself rounds a timeout up to a whole millisecond, which is as long as a hop over an emulated link. `select`
    does not, and here it watches a single descriptor: that of epoll, which is readable when any other one is ready.
    `select` takes descriptors below 1024 only; that of epoll is one of the first that a process opens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.absences = Absences()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """The descriptors that are ready, after at most `timeout` seconds; None waits without a limit."""
        self.absences.leave(time.perf_counter())
        ready = self._ready(timeout)
        self.absences.enter(time.perf_counter(), processor_wait_s())
        return ready

    def _ready(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > _COARSE_S:
            # One system call instead of two. It ends before the timer is due, and the event loop waits again.
            return super().select(timeout - _COARSE_S)
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class Absences:
    """How long descriptors were not looked at, at most, of late. Times are those of `time.perf_counter`.

    Work begins with `enter` and ends with `leave`, where the thread waits for descriptors. It is told how long the
    thread has waited for a processor so far: a descriptor may have been ready meanwhile.
    """

    def __init__(self) -> None:
        self._entered_s, self._waits_s = time.perf_counter(), processor_wait_s()
        self._worked_s = 0.0  # in the last turn
        self._longest_s = [0.0, 0.0]  # in this span of time, and in the one before it
        self._span_s = self._entered_s  # when this one began

    def leave(self, now_s: float) -> None:
        """The work of a turn ends."""
        self._worked_s = now_s - self._entered_s

    def enter(self, now_s: float, waits_s: float) -> None:
        """The work of the next turn begins."""
        absent_s = max(self._worked_s, waits_s - self._waits_s)
        self._entered_s, self._waits_s = now_s, waits_s
        if now_s - self._span_s > _RECENT_S:
            self._longest_s = [0.0, self._longest_s[0] if now_s - self._span_s < 2 * _RECENT_S else 0.0]
            self._span_s = now_s
        self._longest_s[0] = max(self._longest_s[0], absent_s)

    def longest_s(self, now_s: float) -> float:
        """The longest absence of the last half second or more, the present turn included."""
        return max(*self._longest_s, now_s - self._entered_s)


class EventLoop(asyncio.SelectorEventLoop):
    """An event loop over a `FineEpollSelector`."""

    def __init__(self) -> None:
        self.fine_selector = FineEpollSelector()
        super().__init__(self.fine_selector)


def absent_s() -> float:
    """For how long at most, of late, the running event loop kept what arrived waiting; 0 if it is of another kind."""
    loop = asyncio.get_running_loop()
    return loop.fine_selector.absences.longest_s(time.perf_counter()) if isinstance(loop, EventLoop) else 0.0


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` on such an event loop until it ends."""
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(main)
