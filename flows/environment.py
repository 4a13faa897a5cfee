"""The environment of a flow that is started from the command line.

Prefect reads its settings when it is imported, so an entry point calls `prepare` before its other imports.
"""

from __future__ import annotations

import os
import signal

from flows import STATE

__all__ = ["prepare"]

_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_HOME": str(STATE / "prefect"),
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    # An error is raised, and `run_command` prints it once. Prefect would log a traceback at each level of calls.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # on a full disk, hundreds of lines a second
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    # On one machine the flows and the nodes share the cores, so each process gets one thread.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def prepare() -> None:
    """Make the state folder, and set the defaults of the tasks' tools. Variables that are set keep their values.

    Ctrl-C ends the process at once, without a traceback, until `run_command` begins: imports take seconds.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell had it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)  # Prefect makes its own folder, but not its parent
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
