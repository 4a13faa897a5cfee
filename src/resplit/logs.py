"""Where log lines go: standard error, one line each. Knows nothing of what is logged."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TextIO

__all__ = ["Expendable", "log_to_stderr"]


class Expendable:
    """A text stream whose lines may be lost: where the disk is full, what a line tells of must go on without it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what can be handed on."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def log_to_stderr() -> None:
    """Have structlog write to standard error, in colours where that is a terminal."""
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(Expendable(sys.stderr)),  # type: ignore[arg-type]
    )
