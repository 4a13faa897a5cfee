"""Experiments that break a cluster on purpose. In each, no request may be lost and no token may change.

An experiment is a module of this package with `async def run(scale: float, folder: Path) -> list[Finding]`. At
`scale` 1 it runs at full length; the tests run some at a small scale. It writes into `folder` only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Finding

Experiment = Callable[[float, Path], Coroutine[Any, Any, list[Finding]]]
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
    "idle_connections",
    "hostile",
    "floods",
)


def experiment(name: str) -> Experiment:
    """The experiment called `name`. Its module is imported only now, since some need heavy packages."""
    run: Experiment = importlib.import_module(f"benchmarks.chaos.{name}").run
    return run
