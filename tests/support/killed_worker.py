"""A policy that kills the process which started its simulation, once: a worker of a study."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import ClassVar

import numpy as np

from resplit.decide import Decision
from resplit.policies.base import Occasion, Situation, keep

MARK = "KILLED_WORKER_MARK"  # the environment variable that names the file which says that it is done


class KillsItsWorker:
    """Keeps the first placement."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick"})

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """Keep, after the parent was killed if it had not been before."""
        mark = Path(os.environ[MARK])
        if not mark.exists():
            mark.write_text(str(os.getppid()), encoding="utf-8")
            os.kill(os.getppid(), signal.SIGKILL)
        return keep(situation, "it keeps")
