"""Runs a flow from the command line: logs go to stderr, errors become one line, Ctrl-C and SIGTERM stop it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from flows.orphans import keep_servers_from_ctrl_c, watch_this_process
from resplit.errors import ResplitError
from resplit.process.logs import log_to_stderr


def run_command(work: Callable[[], object]) -> None:
    """Call `work`. Exit with status 1 and one line after a `ResplitError`, and with 130 after an interruption."""
    log_to_stderr()
    watch_this_process()
    keep_servers_from_ctrl_c()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `environment.prepare`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except ResplitError as error:
        sys.exit(f"resplit: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
