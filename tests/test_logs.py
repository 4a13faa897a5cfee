"""Logging to standard error."""

from __future__ import annotations

import io

import pytest
import structlog

from resplit.logs import LossyStream, log_to_stderr


class FullDisk(io.StringIO):
    """A stream whose writes fail while it is full."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)

    def flush(self) -> None:
        if self.full:
            raise OSError(28, "No space left on device")


def test_a_line_on_a_full_disk_is_lost_and_later_lines_are_written() -> None:
    disk = FullDisk()
    stream = LossyStream(disk)

    print("one", file=stream, flush=True)
    disk.full = True
    print("two", file=stream, flush=True)
    disk.full = False
    print("three", file=stream, flush=True)

    assert disk.getvalue() == "one\nthree\n"


def test_logging_to_a_full_disk_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk()
    disk.full = True
    monkeypatch.setattr("sys.stderr", disk)
    try:
        log_to_stderr()
        structlog.get_logger("test").warning("a node is lost", node="a")
    finally:
        structlog.reset_defaults()
