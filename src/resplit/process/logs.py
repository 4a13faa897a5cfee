"""Configures logging: one line for each event, on standard error."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO


class LossyStream:
    """A text stream whose lines may be lost: on a full disk, the program continues without its log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()


class Throttle:
    """A structlog processor that bounds how many lines of one event are written in a second.

    A member that sends nonsense as fast as it can must not slow its neighbours down by what is logged about it. How
    many lines were left out is told with the next line of the event that is written.
    """

    def __init__(self, most_per_s: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_per_s = most_per_s
        self._clock = clock
        self._written: dict[str, tuple[int, int, int]] = {}  # by event: its second, lines written in it, lines left out

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The event, or DropEvent."""
        import structlog

        name, now = str(event.get("event")), int(self._clock())
        second, written, left_out = self._written.get(name, (now, 0, 0))
        if second != now:
            second, written = now, 0
        if written >= self._most_per_s:
            self._written[name] = second, written, left_out + 1
            raise structlog.DropEvent
        if left_out:
            event["left_out"] = left_out
        self._written[name] = second, written + 1, 0
        return event


def log_to_stderr() -> None:
    """Have structlog write to standard error, in colours if that is a terminal."""
    import structlog

    structlog.configure(
        processors=[
            Throttle(),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(LossyStream(sys.stderr)),  # type: ignore[arg-type]
    )


def log_errors_only() -> None:
    """Log no warnings from now on: that a process which stops takes its connections with it is no news."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
