"""How long a thread has waited for a processor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resplit.process.processor_wait import processor_wait_s


def test_each_thread_reads_how_long_it_waited_itself() -> None:
    def waited_s() -> tuple[float, float, float]:
        first_s = processor_wait_s()
        told_s = int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
        return first_s, told_s, processor_wait_s()

    for first_s, told_s, last_s in (waited_s(), ThreadPoolExecutor(1).submit(waited_s).result()):
        assert first_s <= told_s <= last_s
