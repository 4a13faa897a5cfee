"""Ends Prefect's own server when the process of a flow is killed: it would run on for ever.

Prefect starts the server as a child, and ends it in an orderly exit only. So another process watches this one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

import psutil

__all__ = ["keep_servers_from_ctrl_c", "watch_this_process"]

_MARK = "RESPLIT_FLOW_PID"  # the servers of a flow inherit it
_SERVER_MARK = "PREFECT__SERVER_EPHEMERAL"


def watch_this_process() -> None:
    """Have the Prefect servers that this process starts from now on end with it, however it ends."""
    os.environ[_MARK] = str(os.getpid())
    watched, _held_until_the_end = os.pipe()  # the kernel closes it, also after SIGKILL
    command = [sys.executable, "-I", __file__, os.environ[_MARK]]
    # Ctrl-C is not for the watcher, and who reads this process's output does not wait for it.
    subprocess.Popen(command, stdin=watched, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(watched)


def keep_servers_from_ctrl_c() -> None:
    """Have the Prefect servers that this process starts outlive Ctrl-C, which a terminal sends to all its processes.

    The flow tells its server that it was interrupted. Without a server it would try for a minute.
    """
    from prefect.server.api.server import SubprocessASGIServer

    start = SubprocessASGIServer._run_uvicorn_command

    def start_blocked(self: SubprocessASGIServer) -> subprocess.Popen[Any]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits it
        try:
            return start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    SubprocessASGIServer._run_uvicorn_command = start_blocked  # type: ignore[method-assign]


def _end_servers(flow: str) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found = process.environ()
            if found.get(_MARK) == flow and _SERVER_MARK in found:
                process.terminate()


if __name__ == "__main__":
    while os.read(0, 1):
        pass
    _end_servers(sys.argv[1])
