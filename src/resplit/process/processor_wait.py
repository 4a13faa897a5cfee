"""For how long a thread has waited for a processor, as Linux counts it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["processor_wait_s"]

_FILE_BYTES = 256
_WAITS = Path("/proc/thread-self/schedstat")  # proc(5): time on a processor, time of waiting for one, time slices
_of_thread = threading.local()  # has that file, which stays open: to open it takes ten times as long as to read it


def processor_wait_s() -> float:
    """For how long the calling thread has waited for a processor so far; 0 where the system does not tell."""
    try:
        if not hasattr(_of_thread, "waits"):
            _of_thread.waits = _WAITS.open("rb", buffering=0)
        return int(os.pread(_of_thread.waits.fileno(), _FILE_BYTES, 0).split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
