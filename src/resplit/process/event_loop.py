"""The event loop of nodes and of the gateway: timers of 0.1 ms, and no bound on the number of descriptors."""

from __future__ import annotations

import asyncio
import select
import selectors
from asyncio import sslproto
from collections.abc import Coroutine
from typing import Any

# asyncio keeps a read buffer of this size for each TLS connection, also for one whose handshake never ends. Its own
# 256 KiB would let strangers take 30 MiB of a small node.
sslproto.SSLProtocol.max_size = 64 * 1024


_COARSE_S = 0.002  # twice the error of epoll's own timeouts


class FineEpollSelector(selectors.EpollSelector):
    """Waits for descriptors as epoll does, but not longer than a timeout that is exact to microseconds.

    epoll itself rounds a timeout up to a whole millisecond, which is as long as a hop over an emulated link. `select`
    does not, and here it watches a single descriptor: that of epoll, which is readable when any other one is ready.
    `select` takes descriptors below 1024 only; that of epoll is one of the first that a process opens.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """The descriptors that are ready, after at most `timeout` seconds; None waits without a limit."""
        if timeout is not None and timeout > _COARSE_S:
            # One system call instead of two. It ends before the timer is due, and the event loop waits again.
            return super().select(timeout - _COARSE_S)
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop over a `FineEpollSelector`."""
    return asyncio.SelectorEventLoop(FineEpollSelector())


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` on such an event loop until it ends."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)
