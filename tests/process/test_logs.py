"""Logging to standard error."""

from __future__ import annotations

import contextlib
import io

import pytest
import structlog

from resplit.process.logs import LossyStream, Throttle, log_errors_only, log_to_stderr


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


def test_lines_of_one_event_are_bounded_in_a_second_and_the_next_line_counts_those_left_out() -> None:
    now_s = [5.0]
    throttle = Throttle(most_per_s=3, clock=lambda: now_s[0])

    def logged(event: str, count: int) -> list[object]:
        lines: list[object] = []
        for _ in range(count):
            with contextlib.suppress(structlog.DropEvent):
                lines.append(throttle(None, "info", {"event": event}).get("left_out", 0))
        return lines

    assert logged("answer ignored", 1000) == [0, 0, 0]
    assert logged("a node is lost", 2) == [0, 0]
    now_s[0] = 6.2
    assert logged("answer ignored", 2) == [997, 0]
    now_s[0] = 9.0
    assert logged("answer ignored", 4) == [0, 0, 0]
    now_s[0] = 10.0
    assert logged("answer ignored", 1) == [1]


def test_the_log_of_a_process_is_throttled(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        log_to_stderr()
        for number in range(100):
            structlog.get_logger("test").info("answer ignored", number=number)
    finally:
        structlog.reset_defaults()
    assert 20 <= capsys.readouterr().err.count("answer ignored") <= 40


def test_a_process_that_stops_logs_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        log_to_stderr()
        log = structlog.get_logger("test")
        log_errors_only()
        log.warning("the connection of a request failed")
        log.error("a defect")
    finally:
        structlog.reset_defaults()
    said = capsys.readouterr().err
    assert "a defect" in said
    assert "failed" not in said
