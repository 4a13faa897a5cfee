"""`python -m benchmarks.chaos.crash_at_step before|after NUMBER serve ...`: `resplit`, killed at a step of its log."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from resplit.cli import main
from resplit.control.log import EpochLog, EpochStep


def die_at(when: str, number: int) -> None:
    """End this process as by `kill -9` before or after the append number `number` (from 1) to the epoch log."""
    append, done = EpochLog.append, 0

    def mortal(self: EpochLog, epoch: int, step: EpochStep, detail: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        if done == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, epoch, step, detail)
        if done == number and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    EpochLog.append = mortal  # type: ignore[method-assign]


if __name__ == "__main__":
    die_at(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    main()
