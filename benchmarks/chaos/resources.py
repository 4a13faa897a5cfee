"""Memory and file handles of a cluster's processes while something is done to it, and what is left of it after."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from statistics import median

import psutil

from benchmarks.chaos.findings import Finding
from resplit.cluster.local import Cluster

_EVERY_S = 1.0
_MORE_MIB = 32  # an allocator keeps some of what a peak needed
_MORE_HANDLES = 8  # connections that are about to close


@dataclass(frozen=True)
class Sample:
    """One process at one moment (monotonic clock)."""

    at_s: float
    rss_bytes: int
    handles: int
    threads: int


@dataclass
class Watch:
    """Samples of each process by name."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def look(self, cluster: Cluster) -> None:
        """Take a sample of every process that lives."""
        for name, process in cluster.processes.items():
            with contextlib.suppress(psutil.Error):
                seen = psutil.Process(process.pid)
                sample = Sample(time.monotonic(), seen.memory_info().rss, seen.num_fds(), seen.num_threads())
                self.samples.setdefault(name, []).append(sample)

    def findings(self, experiment: str) -> list[Finding]:
        """The growth of each: the last seconds against the time after the first fifth, when all is warm."""
        rss = {name: _growth([s.rss_bytes / 2**20 for s in samples]) for name, samples in self.samples.items()}
        handles = {name: _growth([float(s.handles) for s in samples]) for name, samples in self.samples.items()}
        most = {name: max(s.rss_bytes for s in samples) / 2**20 for name, samples in self.samples.items()}
        worst, leaky = max(rss, key=lambda n: rss[n]), max(handles, key=lambda n: handles[n])
        return [
            Finding(
                experiment,
                "growth of resident memory, the process that grew most",
                f"{rss[worst]:+.1f} MiB ({worst}; peak {most[worst]:.0f} MiB)",
                f"<= {_MORE_MIB} MiB",
                met=rss[worst] <= _MORE_MIB,
            ),
            Finding(
                experiment,
                "growth of open file handles, the process that grew most",
                f"{handles[leaky]:+.0f} ({leaky})",
                f"<= {_MORE_HANDLES}",
                met=handles[leaky] <= _MORE_HANDLES,
            ),
        ]


@contextlib.asynccontextmanager
async def watching(cluster: Cluster) -> AsyncIterator[Watch]:
    """Look once a second until the end of the block."""
    watch = Watch()

    async def keep_looking() -> None:
        while True:
            watch.look(cluster)
            await asyncio.sleep(_EVERY_S)

    task = asyncio.create_task(keep_looking())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait({task})
        watch.look(cluster)


def _growth(values: list[float]) -> float:
    warm = values[len(values) // 5 :]
    few = max(1, min(5, len(warm) // 4))
    return median(warm[-few:]) - median(warm[:few])
