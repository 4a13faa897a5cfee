"""What the testbed consists of, computed from a cluster file: addresses, links, and quotas of the processor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from resplit.config import ClusterConfig, NodeConfig, parse_cluster
from resplit.errors import ConfigError
from resplit.scenario import ScenarioConfig

__all__ = [
    "Link",
    "Shape",
    "address",
    "cluster_of_real_machines",
    "cores_of",
    "faster",
    "faster_scenario",
    "links_of",
    "namespace",
    "quota",
    "shares",
    "token_s",
]

PORT = 7000
_MTU = 1500
_PERIOD_US, _LEAST_QUOTA_US = 10_000, 1_000  # the kernel takes no quota below a millisecond


@dataclass(frozen=True)
class Shape:
    """How a link behaves, each way. Packets stay in order: jitter (uniform, to both sides) delays those behind, too."""

    latency_s: float
    bandwidth_bytes_per_s: float
    jitter_s: float = 0.0
    loss: float = 0.0

    def tbf(self) -> list[str]:
        """Arguments of tc's token bucket filter: the bandwidth, with a queue of half a second."""
        burst = max(4 * _MTU, round(self.bandwidth_bytes_per_s * 0.002))
        rate = round(8 * self.bandwidth_bytes_per_s)
        return ["tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", "500ms"]


@dataclass(frozen=True)
class Link:
    """The link between two nodes: a device in the namespace of each, named after the number of the peer."""

    between: tuple[str, str]
    numbers: tuple[int, int]
    shape: Shape

    def ends(self) -> tuple[tuple[str, str, str, str], ...]:
        """For each end: node, device, its own address, the peer's address."""
        (one, other), (i, j) = self.between, self.numbers
        return ((one, f"to-{j}", address(i), address(j)), (other, f"to-{i}", address(j), address(i)))


def namespace(node: str) -> str:
    """The network namespace of a node."""
    return f"resplit-testbed-{node}"


def address(number: int) -> str:
    """The address of a node, by its place in the cluster file from 0 on."""
    return f"10.77.0.{number + 1}"


def links_of(cluster: ClusterConfig) -> list[Link]:
    """A link for every two nodes, shaped as the cluster file declares. ConfigError if it declares no links."""
    links = []
    for (i, one), (j, other) in itertools.combinations(enumerate(cluster.node_names), 2):
        declared = cluster.link(one, other)
        if declared is None:
            raise ConfigError(f"{cluster.name}: links", "the testbed needs the latency and bandwidth of every link")
        links.append(Link((one, other), (i, j), Shape(declared.latency, declared.bandwidth)))
    return links


def faster(content: Mapping[str, Any], pace: float) -> dict[str, Any]:
    """The same cluster file at another pace: with so much more load, and so much less time for a request."""
    found = deepcopy(dict(content))
    for each, parsed in zip(found["classes"], parse_cluster(content, "cluster").classes, strict=True):
        each["rate_rps"] = parsed.rate_rps * pace
        if parsed.slo is not None:
            each["slo"] = f"{parsed.slo / pace} s"
    return found


def faster_scenario(scenario: ScenarioConfig, pace: float) -> ScenarioConfig:
    """The same scenario with so much more load."""
    load = tuple(change.model_copy(update={"rate_rps": change.rate_rps * pace}) for change in scenario.load)
    return scenario.model_copy(update={"load": load})


def cluster_of_real_machines(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same cluster file for real machines: with addresses, and without emulated nodes and links."""
    real = deepcopy(dict(content))
    real.pop("links", None)
    for number, node in enumerate(real["nodes"]):
        node.pop("emulate", None)
        node["address"] = f"{address(number)}:{PORT}"
    return real


def token_s(node: NodeConfig, kinds: tuple[str, ...]) -> float:
    """Declared seconds of a decode step of one session through blocks of these kinds. ConfigError if not emulated."""
    if node.emulate is None:
        raise ConfigError(f"nodes: {node.name}", "declares no times, from which the testbed takes its speed")
    parts = node.emulate.decode_per_token.parts()
    return sum(sum(parts[kind]) for kind in kinds)


def shares(cluster: ClusterConfig, kinds: tuple[str, ...], full_speed_s: float, speed: float) -> dict[str, float]:
    """The share of a core for each node, so that computing a token takes 1 / `speed` of its declared time.

    `full_speed_s` is a token's time on a whole core. ConfigError if a node would need more than a core.
    """
    found = {node.name: speed * full_speed_s / token_s(node, kinds) for node in cluster.nodes}
    for name, share in found.items():
        if share > 1:
            raise ConfigError("--speed", f"{name} would need {share:.2f} cores for {speed:g} times its declared speed")
    return found


def quota(share: float) -> tuple[int, int]:
    """Quota and period in microseconds for a share of a core. The period is longer where the quota would be too small.

    A short period is better: within one, a node that was idle computes at the speed of a whole core.
    """
    period_us = max(_PERIOD_US, -(-_LEAST_QUOTA_US // share))
    return max(_LEAST_QUOTA_US, round(share * period_us)), int(period_us)


def cores_of(shares: Mapping[str, float], cores: int) -> dict[str, int]:
    """The core to which each node is pinned: from the greatest share on, the one with the least load.

    A node and what others do on it must share a core, or both would run at once.
    """
    load = [0.0] * cores
    found = {}
    for name in sorted(shares, key=lambda name: -shares[name]):
        found[name] = load.index(min(load))
        load[found[name]] += shares[name]
    return found
