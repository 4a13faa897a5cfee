"""`python -m benchmarks.chaos.crash_at_step before|after NUMBER serve ...`: runs `resplit` until a step of its log."""

from __future__ import annotations

import os
import signal
import sys

from resplit.cli import main
from resplit.control.log import Detail, EpochLog, EpochStep


def kill_at(when: str, number: int) -> None:
    """Kill this process (SIGKILL) before or after append number `number`, counted from 1, to the epoch log."""
    append, appended = EpochLog.append, 0

    def controller(self: EpochLog, epoch: int, step: EpochStep, detail: Detail | None = None) -> None:
        nonlocal appended
        appended += 1
        if appended == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, epoch, step, detail)
        if appended == number and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    EpochLog.append = controller  # type: ignore[method-assign]


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    main()
