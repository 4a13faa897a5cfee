"""Memory and file handles of a cluster's processes during an experiment, to find leaks."""

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
_MAX_GROWTH_MIB = 32  # an allocator keeps part of a peak
MAX_GROWTH_HANDLES = 8  # connections that are about to close


@dataclass(frozen=True)
class Sample:
    """One process at one moment (monotonic clock)."""

    at_s: float
    rss_bytes: int
    handles: int
    threads: int


@dataclass
class ResourceUsage:
    """Samples of each process by name."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def sample(self, cluster: Cluster) -> None:
        """Sample every process that runs."""
        for name, process in cluster.processes.items():
            with contextlib.suppress(psutil.Error):
                seen = psutil.Process(process.pid)
                sample = Sample(time.monotonic(), seen.memory_info().rss, seen.num_fds(), seen.num_threads())
                self.samples.setdefault(name, []).append(sample)

    def findings(self, experiment: str) -> list[Finding]:
        """Growth per process: the end of the experiment against its beginning, without the first fifth as warm-up."""
        rss = {name: _growth([s.rss_bytes / 2**20 for s in samples]) for name, samples in self.samples.items()}
        handles = {name: _growth([float(s.handles) for s in samples]) for name, samples in self.samples.items()}
        most = {name: max(s.rss_bytes for s in samples) / 2**20 for name, samples in self.samples.items()}
        worst, leaky = max(rss, key=lambda n: rss[n]), max(handles, key=lambda n: handles[n])
        return [
            Finding(
                experiment,
                "growth of resident memory, the process that grew most",
                f"{rss[worst]:+.1f} MiB ({worst}; peak {most[worst]:.0f} MiB)",
                f"<= {_MAX_GROWTH_MIB} MiB",
                met=rss[worst] <= _MAX_GROWTH_MIB,
            ),
            Finding(
                experiment,
                "growth of open file handles, the process that grew most",
                f"{handles[leaky]:+.0f} ({leaky})",
                f"<= {MAX_GROWTH_HANDLES}",
                met=handles[leaky] <= MAX_GROWTH_HANDLES,
            ),
        ]


@contextlib.asynccontextmanager
async def sampling(cluster: Cluster) -> AsyncIterator[ResourceUsage]:
    """Sample once a second until the end of the block."""
    usage = ResourceUsage()

    async def keep_sampling() -> None:
        while True:
            usage.sample(cluster)
            await asyncio.sleep(_EVERY_S)

    task = asyncio.create_task(keep_sampling())
    try:
        yield usage
    finally:
        task.cancel()
        await asyncio.wait({task})
        usage.sample(cluster)


def _growth(values: list[float]) -> float:
    warm = values[len(values) // 5 :]
    few = max(1, min(5, len(warm) // 4))
    return median(warm[-few:]) - median(warm[:few])
