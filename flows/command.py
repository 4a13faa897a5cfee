"""How a flow is run from the command line: logs to stderr, errors as one line, Ctrl-C and SIGTERM stop everything."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from resplit.errors import ResplitError
from resplit.logs import log_to_stderr


def run_command(work: Callable[[], object]) -> None:
    """Call `work`; leave with status 1 and one line where resplit says no, with 130 where it was interrupted."""
    log_to_stderr()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except ResplitError as error:
        sys.exit(f"resplit: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
