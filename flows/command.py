"""Runs a flow from the command line: logs go to stderr, errors become one line, Ctrl-C and SIGTERM stop it."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from types import FrameType

from flows.orphans import keep_servers_from_ctrl_c, watch_this_process
from resplit.errors import ResplitError
from resplit.process.logs import log_to_stderr

_STOP_WITHIN_S = 15.0
_FULL = ("SQLITE_FULL", "SQLITE_IOERR")
_interrupted = threading.Event()


def run_command(work: Callable[[], object]) -> None:
    """Call `work`. Exit with status 1 and one line after a `ResplitError`, and with 130 after an interruption."""
    log_to_stderr()
    watch_this_process()
    keep_servers_from_ctrl_c()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's `&` has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        work()
    except ResplitError as error:
        sys.exit(f"resplit: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _interrupted.is_set() and not _ended_a_crash(error):
            if isinstance(error, OSError) and is_disk_full(error):
                sys.exit(f"resplit: {error.filename or 'a disk'}: {error.strerror}; make room there, and start again")
            if unwritable := _unwritable_store(error):
                sys.exit(f"resplit: a store of MLflow or Prefect: {unwritable}; make room there, and start again")
            raise
        sys.exit(130)  # the orderly end failed: Prefect's server got the signal too, say


def is_disk_full(error: OSError) -> bool:
    """Whether a file could not be written because there is no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _unwritable_store(error: BaseException | None) -> sqlite3.OperationalError | None:
    """The error of SQLite behind `error`, if a disk is full: it calls that an I/O error, too."""
    while error is not None:
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname.startswith(_FULL):
            return error
        error = error.__cause__ or error.__context__
    return None


def _ended_a_crash(error: BaseException) -> bool:
    """Whether `error` arose while an interruption was handled: in a flow, SIGTERM raises a signal of Prefect's own."""
    before = error.__context__
    return before is not None and (not isinstance(before, Exception) or _ended_a_crash(before))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, and end this process if its orderly end takes longer than `_STOP_WITHIN_S`.

    An orderly end tells Prefect's server, among others, and took half a minute on a busy machine. Nothing is left
    running after the other one: the processes of a cluster end with this one, and so do Prefect's servers.
    """
    _interrupted.set()
    late = threading.Timer(_STOP_WITHIN_S, os._exit, [130])
    late.daemon = True  # the orderly end does not wait for it
    late.start()
    signal.default_int_handler(number, frame)
