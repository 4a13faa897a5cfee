"""A process of a cluster that counts what its event loop does: `python -m benchmarks.serving.counted_process FILE ...`.

The command line after FILE is that of `resplit`. On SIGUSR1 it writes what it has counted so far to FILE.
"""

from __future__ import annotations

import functools
import json
import logging
import signal
import sys
import threading
from asyncio import base_events, events, selector_events
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client
import pydantic
import structlog

from resplit.cli import main
from resplit.files import write_atomically
from resplit.wire.message_stream import MessageStream

counted: Counter[str] = Counter()
# What is counted, and the methods whose calls count for it.
_COUNTED: dict[str, tuple[tuple[Any, str], ...]] = {
    "turns of the event loop": ((base_events.BaseEventLoop, "_run_once"),),
    "callbacks": ((events.Handle, "_run"),),
    "tasks": ((base_events.BaseEventLoop, "create_task"),),
    "futures": ((base_events.BaseEventLoop, "create_future"),),
    "timers": ((base_events.BaseEventLoop, "call_at"),),
    "wakes from another thread": ((base_events.BaseEventLoop, "call_soon_threadsafe"),),
    "wakes of another thread": ((threading.Condition, "notify"),),
    "reads from sockets": ((selector_events._SelectorSocketTransport, "_read_ready"),),  # type: ignore[attr-defined]
    "writes to sockets": ((selector_events._SelectorSocketTransport, "write"),),  # type: ignore[attr-defined]
    "messages received": ((MessageStream, "_next"),),
    "metric updates": (
        (prometheus_client.Counter, "inc"),
        (prometheus_client.Gauge, "inc"),
        (prometheus_client.Gauge, "dec"),
        (prometheus_client.Gauge, "set"),
        (prometheus_client.Histogram, "observe"),
    ),
    "values parsed by pydantic": (
        (pydantic.TypeAdapter, "validate_json"),
        (pydantic.TypeAdapter, "validate_python"),
    ),
    "log lines": ((structlog.PrintLogger, "msg"), (logging.Logger, "handle")),
}


def _count_calls() -> None:
    for what, methods in _COUNTED.items():
        for owner, name in methods:
            setattr(owner, name, _counting(what, getattr(owner, name)))
    write = MessageStream.write

    async def counting_write(stream: MessageStream[Any], pieces: list[bytes]) -> None:
        counted["messages sent"] += len(pieces) // 2
        counted["writes of messages"] += 1
        await write(stream, pieces)

    MessageStream.write = counting_write  # type: ignore[method-assign,assignment]


def _counting(what: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if what != "messages received" or result is not None:
            counted[what] += 1
        return result

    return called


if __name__ == "__main__":
    file = Path(sys.argv[1])
    _count_calls()
    signal.signal(signal.SIGUSR1, lambda number, frame: write_atomically(file, json.dumps(counted)))
    sys.argv = ["resplit", *sys.argv[2:]]
    main()
