"""Experiments that break a cluster on purpose, and what they must find: every token right, no request lost.

An experiment is a module of this package with `async def run(scale: float, folder: Path) -> list[Finding]`. `scale` 1
is the full length; tests run the same functions at a small one. What it writes goes into `folder`, which is its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.chaos.findings import Finding

Experiment = Callable[[float, Path], Awaitable[list[Finding]]]
EXPERIMENTS = (
    "resplits",
    "pauses",
    "kills",
    "double_kill",
    "hangs",
    "too_few_nodes",
    "controller_crashes",
    "random_schedules",
    "false_positives",
    "controller_kills",
    "link_cuts",
    "registry_outage",
    "full_disk",
    "outages",
    "fuzz_http",
    "fuzz_wire",
    "overload",
)


def experiment(name: str) -> Experiment:
    """The experiment called `name`; its module is imported now, for some need what others do not."""
    run: Experiment = importlib.import_module(f"benchmarks.chaos.{name}").run
    return run
