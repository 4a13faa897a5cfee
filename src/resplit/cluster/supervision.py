"""Supervision of the processes of a cluster on this machine: one that ends is started again, and both are reported.

The report is a file in the state folder, which `resplit status` reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import structlog
from pydantic import TypeAdapter, ValidationError

from resplit.cluster.local import Cluster, last_error, start_process
from resplit.errors import DataError
from resplit.files import write_atomically

_log = structlog.get_logger(__name__)
_CHECK_EVERY_S = 0.2
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
# After a life of this length the next wait is the first one again.
_LONG_LIFE_S = 60.0


@dataclass(frozen=True)
class Restarts:
    """How often a process was started again, how it ended last, and the wait that now runs (None while it lives)."""

    count: int
    ended: str
    wait_s: float | None


@dataclass(frozen=True)
class _RestartReport:
    """`supervisor` is the process that supervises: once it has ended, the report is out of date."""

    supervisor: int
    processes: dict[str, Restarts]


_REPORT = TypeAdapter(_RestartReport)


@dataclass
class _Life:
    """One process: when it was started, or when it is to be started, and the length of the next wait."""

    started_s: float
    next_wait_s: float = _FIRST_WAIT_S
    restart_s: float | None = None


class Supervisor:
    """Starts processes again after waits of 1, 2, 4 ... 60 s. A process that lived for 60 s begins again with 1 s."""

    def __init__(self, cluster: Cluster, names: Iterable[str], now_s: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._now_s = now_s
        self._lives = {name: _Life(now_s()) for name in names}
        self._restarts: dict[str, Restarts] = {}

    def check(self) -> None:
        """Note which processes have ended, and start those whose wait is over."""
        for name, life in self._lives.items():
            if name in self._cluster.held_down:
                life.restart_s = None
                continue
            if life.restart_s is None:
                status = self._cluster.processes[name].poll()
                if status is not None:
                    self._wait_after(name, life, _how_it_ended(self._cluster, name, status))
            elif self._now_s() >= life.restart_s:
                self._start(name, life)

    def _wait_after(self, name: str, life: _Life, ended: str) -> None:
        lived_s = self._now_s() - life.started_s
        wait_s = _FIRST_WAIT_S if lived_s >= _LONG_LIFE_S else life.next_wait_s
        life.next_wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)
        life.restart_s = self._now_s() + wait_s
        count = self._restarts[name].count if name in self._restarts else 0
        _log.warning("a process ended", process=name, how=ended, lived_s=round(lived_s, 1), restart_after_s=wait_s)
        self._report(name, Restarts(count, ended, wait_s))

    def _start(self, name: str, life: _Life) -> None:
        life.started_s, life.restart_s = self._now_s(), None
        try:
            start_process(self._cluster, name)
        except OSError as error:  # no memory, no descriptors: perhaps there are some later
            self._wait_after(name, life, f"could not be started: {error.strerror}")
            return
        done = replace(self._restarts[name], count=self._restarts[name].count + 1, wait_s=None)
        pid = self._cluster.processes[name].pid
        _log.info("a process is started again", process=name, pid=pid, restarts=done.count)
        self._report(name, done)

    def _report(self, name: str, restarts: Restarts) -> None:
        self._restarts[name] = restarts
        try:
            content = _REPORT.dump_json(_RestartReport(os.getpid(), self._restarts))
            write_atomically(_report_file(self._cluster.state), content, 0o600)
        except OSError as error:  # supervision goes on without its report
            _log.warning("the report of restarts cannot be written", error=str(error))


@contextlib.contextmanager
def supervised(cluster: Cluster, names: Iterable[str]) -> Iterator[Future[None]]:
    """Supervise the processes `names` of a running cluster, in a thread, until the end of the block.

    The future is done only if supervision itself fails; its exception says why.
    """
    supervisor, stop = Supervisor(cluster, names), threading.Event()

    def watch() -> None:
        while not stop.wait(_CHECK_EVERY_S):
            supervisor.check()

    with ThreadPoolExecutor(1, "supervisor") as thread:
        try:
            yield thread.submit(watch)
        finally:
            stop.set()
    _report_file(cluster.state).unlink(missing_ok=True)


def read_restarts(state: Path) -> dict[str, Restarts]:
    """The processes in a state folder that ended while they were supervised; DataError if the report is malformed."""
    path = _report_file(state)
    try:
        report = _REPORT.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['msg']}; is `resplit up` of the same version?") from None
    return report.processes if psutil.pid_exists(report.supervisor) else {}


def describe_restarts(restarts: Restarts) -> str:
    """The restarts of one process in words."""
    times = "once" if restarts.count == 1 else f"{restarts.count} times"
    now = "" if restarts.wait_s is None else f", starts again after {restarts.wait_s:g} s"
    return f"restarted {times}, last end: {restarts.ended}{now}"


def _report_file(state: Path) -> Path:
    return state / "restarts.json"


def _how_it_ended(cluster: Cluster, name: str, status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}, {last_error(cluster.state, name)}"
