"""A node that notes when its passes ran: `python -m benchmarks.serving.timed_node FILE node ...`.

The command line after FILE is that of `resplit`. When the node ends, it writes its passes to FILE. Their clock is the
same in all processes of a machine.
"""

from __future__ import annotations

import atexit
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from resplit.cli import main
from resplit.node import hosting
from resplit.node.batching import Batch, Part
from resplit.node.executor import Executor
from resplit.node.pass_results import PassResult


@dataclass(frozen=True)
class Pass:
    """A pass of a session through the segment that begins with block `first`; `compute_s` is processor time."""

    session: str
    first: int
    position: int
    begin_s: float
    end_s: float
    compute_s: float


class TimedExecutor(Executor):
    """An executor that notes the times of each pass."""

    passes: ClassVar[list[Pass]] = []

    def _outcomes(self, batch: Batch) -> list[tuple[Part, PassResult | Exception]]:
        begin_s, used_s = time.perf_counter(), time.thread_time()
        outcomes = super()._outcomes(batch)
        end_s, compute_s = time.perf_counter(), time.thread_time() - used_s
        works = [part.waiting.work for part in batch.parts]
        TimedExecutor.passes += [
            Pass(work.session, work.first, work.start, begin_s, end_s, compute_s) for work in works
        ]
        return outcomes


def _write(file: Path) -> None:
    file.write_text(json.dumps([asdict(each) for each in TimedExecutor.passes]), encoding="utf-8")


if __name__ == "__main__":
    atexit.register(_write, Path(sys.argv[1]))
    hosting.Executor = TimedExecutor  # type: ignore[attr-defined]
    sys.argv = ["resplit", *sys.argv[2:]]
    main()
