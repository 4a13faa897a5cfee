"""Make the changes of a scenario in a running cluster, each at its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

import structlog

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.config import ClusterConfig
from resplit.errors import ResplitError
from resplit.phases import Pair, Phase, declared_phase, phases_of
from resplit.scenario import ScenarioConfig

__all__ = ["play", "reset"]

_log = structlog.get_logger(__name__)
_BACK_WITHIN_S, _LOOK_EVERY_S = 30.0, 0.1


async def play(control: ControlClient, cluster: Cluster, phases: Sequence[Phase], begun_s: float) -> None:
    """Make the changes with which each phase begins; `begun_s` is the start of the workload (monotonic clock)."""
    for phase in phases:
        if phase.changed:
            await asyncio.sleep(max(0.0, begun_s + phase.at_s - time.monotonic()))
            _log.info("scenario change", label="; ".join(phase.labels))
            await asyncio.to_thread(_make, control, cluster, phase, phase.changed)


def reset(control: ControlClient, cluster: Cluster, declared: ClusterConfig, scenario: ScenarioConfig) -> None:
    """Set every node and link that a scenario changes back to what the cluster file declares, and wait for them."""
    changed = {subject for phase in phases_of(declared, scenario) for subject in phase.changed}
    _make(control, cluster, declared_phase(declared, scenario), changed)
    _await_nodes(control, cluster.config.node_names)


def _make(control: ControlClient, cluster: Cluster, phase: Phase, changed: Collection[str | Pair]) -> None:
    """Have nodes and links behave as in `phase`. A node that returns learns of the links that changed meanwhile."""
    down = {name for name, node in phase.nodes.items() if not node.up}
    for name in sorted(down.intersection(changed)):
        cluster.hold_down(name)
    returned = [name for name in sorted(cluster.held_down - down) if name in changed]
    for name in returned:
        cluster.start_again(name)
    _await_nodes(control, returned)
    links = {pair for pair in phase.links if pair in changed or set(pair) & set(returned)}
    for name in sorted(name for name in phase.nodes if name in changed and name not in down):
        node = phase.nodes[name]
        control.emulate_node(name, node.slowdown, node.background_utilization)
    for pair in sorted(pair for pair in links if not down & set(pair)):
        link = phase.links[pair]
        control.emulate_link(*pair, link.latency_s, link.bandwidth_bytes_per_s)


def _await_nodes(control: ControlClient, names: Collection[str]) -> None:
    """Wait until these nodes answer the controller; ResplitError if one does not in time."""
    until_s = time.monotonic() + _BACK_WITHIN_S
    while missing := set(names) - {node.node for node in control.status().nodes if node.answers}:
        if time.monotonic() > until_s:
            raise ResplitError(f"{', '.join(sorted(missing))} did not come back within {_BACK_WITHIN_S:.0f} s")
        time.sleep(_LOOK_EVERY_S)
