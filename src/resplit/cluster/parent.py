"""The child's side of supervision: a process ends when its parent has ended, however that happened."""

from __future__ import annotations

import contextlib
import os
import threading

_STDIN, _STDERR = 0, 2


def end_with_parent() -> None:
    """End this process once its standard input closes.

    The parent holds the other end of that pipe and never writes. The kernel closes it when the parent ends, also by
    SIGKILL. There is no time for an orderly end: state on disk is safe against crashes. A process that is stopped
    (SIGSTOP) ends when it continues.
    """
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    with contextlib.suppress(OSError):  # even if nothing can be written
        while os.read(_STDIN, 1):
            pass
        os.write(_STDERR, b"resplit: the parent process has ended\n")
    os._exit(1)
