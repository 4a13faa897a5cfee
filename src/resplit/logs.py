"""Configures logging: one line for each event, on standard error."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TextIO


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


def log_to_stderr() -> None:
    """Have structlog write to standard error, in colours if that is a terminal."""
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
        logger_factory=structlog.PrintLoggerFactory(LossyStream(sys.stderr)),  # type: ignore[arg-type]
    )
