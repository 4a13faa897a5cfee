"""How busy other programs keep this machine. What was measured meanwhile is measured again when it is quiet."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import psutil
import structlog

from resplit.errors import ResplitError, SlowMachineError
from resplit.node.emulation_check import HEADROOM

__all__ = ["EmulationCheck", "OthersUse", "measured_again_when_quiet"]

_log = structlog.get_logger(__name__)

BUSY_SHARE = 0.2  # of the machine, used by others: measurements are not to be trusted
QUIET_SHARE = 0.1
BUSY_FACTOR = 3.0  # core time of the same work on a busy machine to that on a quiet one, at most
CHECK_EVERY_S = 2.0


class OthersUse:
    """The share of this machine's cores that other processes than `own_pids` use, from one call to the next."""

    def __init__(self, own_pids: Callable[[], Iterable[int]]) -> None:
        self._own_pids = own_pids
        self._last = self._seen()

    def share(self) -> float:
        """The mean share (0 to 1) since the last call, or since the start."""
        (before_s, busy_before_s, own_before), self._last = self._last, self._seen()
        now_s, busy_s, own = self._last
        own_s = sum(used_s - own_before.get(pid, 0.0) for pid, used_s in own.items())
        share = (busy_s - busy_before_s - own_s) / max(now_s - before_s, 1e-3) / (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, share))

    def _seen(self) -> tuple[float, float, dict[int, float]]:
        """The time, the busy core seconds of the machine so far, and those of each own process."""
        times = psutil.cpu_times()
        busy_s = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        own: dict[int, float] = {}
        for pid in self._own_pids():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = psutil.Process(pid).cpu_times()
                own[pid] = used.user + used.system
        return time.monotonic(), busy_s, own


class EmulationCheck:
    """A check of this machine that a busy machine may fail, and that then waits until the machine is quiet.

    `check` raises SlowMachineError if the machine is too slow. `warning` says why emulated nodes may be too slow now.
    """

    def __init__(self, check: Callable[[], None], others: OthersUse) -> None:
        self._check = check
        self._others = others
        self.warning = ""
        self._settled = False  # another check would not say more

    async def at_start(self) -> None:
        """Check now. SlowMachineError if the machine is not busy, or too slow by more than that can explain.

        A machine that reaches the declared times, but without headroom, only gets a warning: each run tells the error
        of its emulation.
        """
        self._others.share()
        if error := await self._failure():
            if error.factor > BUSY_FACTOR or self._others.share() < BUSY_SHARE:
                raise error
            self.warning = f"other programs keep this machine busy, and it may be too slow for this cluster: {error}"
            _log.warning("the emulation is checked again when this machine is quiet", error=str(error))

    async def when_quiet(self) -> None:
        """If the check failed at the start, wait until the machine is quiet and check again."""
        if not self.warning or self._settled:
            return
        self._others.share()
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            if self._others.share() < QUIET_SHARE:
                break
        if error := await self._failure():
            self.warning = f"this machine is too slow for this cluster, and measurements are wrong: {error}"
            _log.error("this machine is too slow for its emulated nodes", error=str(error))
        elif not self._settled:
            self.warning = ""
            _log.info("this machine is quiet, and fast enough for its emulated nodes")

    async def _failure(self) -> SlowMachineError | None:
        """The error of a check now. A machine that only lacks headroom passes, with a warning."""
        try:
            await asyncio.to_thread(self._check)
        except SlowMachineError as error:
            if error.factor > HEADROOM:
                return error
            self._warn_of_no_headroom(error)
        return None

    def _warn_of_no_headroom(self, error: SlowMachineError) -> None:
        self._settled = True
        self.warning = f"this machine is only just fast enough for this cluster, and passes will often be late: {error}"
        _log.warning("this machine is only just fast enough for its emulated nodes", error=str(error))


@contextlib.contextmanager
def measured_again_when_quiet(others: OthersUse, measure: Callable[[], None]) -> Iterator[None]:
    """If the machine was busy since `others` was made, call `measure` in a thread once it is quiet.

    The end of the block ends the wait, but not a measurement. One that fails is logged.
    """
    stop = threading.Event()
    if (share := others.share()) >= BUSY_SHARE:
        _log.warning("the machine was busy: nodes are timed again when it is quiet", others_use=f"{share:.0%}")
        threading.Thread(target=_measure_when_quiet, args=(others, measure, stop), daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _measure_when_quiet(others: OthersUse, measure: Callable[[], None], stop: threading.Event) -> None:
    while not stop.wait(CHECK_EVERY_S):
        if others.share() < QUIET_SHARE:
            try:
                measure()
            except ResplitError as error:
                _log.warning("nodes were not timed again", error=str(error))
            return
