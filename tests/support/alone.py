"""Lets a test have the machine for itself, although pytest runs tests in several processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

# Files that all processes have: only their locks are used. Who waits to be alone holds the queue, so nobody overtakes.
_QUEUE, _MACHINE = Path(__file__), Path(__file__).parent / "processes.py"


@contextlib.contextmanager
def machine(alone: bool) -> Iterator[None]:
    """Hold the machine until the end of the block: without any other test if `alone`, else with others like it."""
    with contextlib.ExitStack() as held:
        with _locked(_QUEUE, fcntl.LOCK_EX):
            held.enter_context(_locked(_MACHINE, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


@contextlib.contextmanager
def _locked(file: Path, kind: int) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)
