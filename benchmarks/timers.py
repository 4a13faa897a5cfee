"""How long a sleep of 0.2 ms takes on the event loop, by its selector and the number of idle connections.

`python -m benchmarks.timers`
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import time
from statistics import median, quantiles

from resplit.process.event_loop import FineEpollSelector

SLEEP_S = 0.0002
SLEEPS = 2000
IDLE = (0, 400, 1500)


def main() -> None:
    """Print the median and the 95th percentile in milliseconds."""
    for kind in (selectors.SelectSelector, selectors.EpollSelector, FineEpollSelector):
        for idle in IDLE:
            print(f"{kind.__name__:18} {idle:5} idle  {_measured(kind, idle)}")


def _measured(kind: type[selectors.BaseSelector], idle: int) -> str:
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(asyncio.SelectorEventLoop(kind())))
        for _ in range(idle):
            here, there = (stack.enter_context(end) for end in socket.socketpair())
            loop.add_reader(there, here.close)
        sleeps = _sleeps_ms()
        try:
            took_ms = loop.run_until_complete(sleeps)
        except ValueError as error:
            sleeps.close()
            return str(error)
    return f"p50 {median(took_ms):.2f} ms, p95 {quantiles(took_ms, n=20)[-1]:.2f} ms"


async def _sleeps_ms() -> list[float]:
    took_ms = []
    for _ in range(SLEEPS):
        begun_s = time.perf_counter()
        await asyncio.sleep(SLEEP_S)
        took_ms.append(1e3 * (time.perf_counter() - begun_s))
    return took_ms


if __name__ == "__main__":
    main()
