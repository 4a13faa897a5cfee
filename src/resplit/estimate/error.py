"""How far the estimate of an emulated cluster is from what holds: what its file declares, and what a scenario changed.

A measured time of a message has the software's time in it, which no file declares. It is alike on all links: the median
of what their messages take longer than declared. What is left over is the error of the estimate.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resplit.config import ClusterConfig, NodeConfig
from resplit.cost.model import CostModel
from resplit.estimate.cluster import Estimates, NodeEstimate
from resplit.estimate.links import LinkEstimate
from resplit.phases import LinkState, NodeState, Pair, Phase, pair_of
from resplit.types import BlockFeatures

__all__ = ["EstimateErrors", "estimate_errors"]

_CONTEXT_TOKENS = 32  # of the decode step that is compared; declared times are the same for all contexts


@dataclass(frozen=True)
class EstimateErrors:
    """Estimated over true, less 1: of a decode step of one session by node; of latency and bandwidth by link.

    `software_s` and `software_s_per_byte` are the software's times for a message; the errors `latency_less_software`
    and `bandwidth_less_software` are those without them.
    """

    speed: dict[str, float] = field(default_factory=dict)
    latency: dict[Pair, float] = field(default_factory=dict)
    bandwidth: dict[Pair, float] = field(default_factory=dict)
    latency_less_software: dict[Pair, float] = field(default_factory=dict)
    bandwidth_less_software: dict[Pair, float] = field(default_factory=dict)
    software_s: float = 0.0
    software_s_per_byte: float = 0.0

    def rows(self) -> list[tuple[str, float, float]]:
        """Each estimate in words with the median and the largest error, without their signs; only what is known."""
        message, megabyte = f"{1e3 * self.software_s:.1f} ms", f"{1e9 * self.software_s_per_byte:.1f} ms"
        named: list[tuple[str, Mapping[Any, float]]] = [
            ("speed of nodes", self.speed),
            ("latency of links, software included", self.latency),
            (f"latency of links, less {message} of software", self.latency_less_software),
            ("bandwidth of links, software included", self.bandwidth),
            (f"bandwidth of links, less {megabyte} of software for a megabyte", self.bandwidth_less_software),
        ]
        sizes = [(name, [abs(error) for error in errors.values()]) for name, errors in named]
        return [(name, statistics.median(found), max(found)) for name, found in sizes if found]

    def medians(self) -> dict[str, float]:
        """The median errors, without their signs, and the software's times; only what is known."""
        errors: dict[str, Mapping[Any, float]] = {
            "speed": self.speed,
            "latency": self.latency,
            "latency_less_software": self.latency_less_software,
            "bandwidth": self.bandwidth,
            "bandwidth_less_software": self.bandwidth_less_software,
        }
        medians = {
            f"estimate_error_{name}": statistics.median(map(abs, found.values()))
            for name, found in errors.items()
            if found
        }
        software = {"software_s": self.software_s, "software_s_per_byte": self.software_s_per_byte}
        return medians | (software if self.latency else {})

    def __str__(self) -> str:
        """The rows as a table."""
        rows = [f"| {name} | {median:.1%} | {largest:.1%} |" for name, median, largest in self.rows()]
        return "\n".join(["| estimate | median error | largest error |", "| --- | --- | --- |", *rows])


def estimate_errors(
    cluster: ClusterConfig,
    features: Sequence[BlockFeatures],
    cost: CostModel,
    estimates: Estimates,
    phase: Phase | None = None,
) -> EstimateErrors:
    """The errors of the estimates, which are relative to `cost`, while nodes and links are as in `phase`.

    Without a phase they are as the file declares. `features` are those of the model's chain of blocks. What the model
    or the file does not know is left out.
    """
    states = phase.nodes if phase else {}
    speed = {}
    for node in cluster.nodes:
        factor = estimates.nodes.get(node.name, NodeEstimate()).factor
        steps, state = _steps_s(node, features, cost), states.get(node.name, NodeState())
        if steps and state.up:
            speed[node.name] = factor * steps[0] / (state.slowdown * steps[1]) - 1
    links = _links(cluster, cost, estimates, phase.links if phase else {})
    latency_s = {pair: (found.latency_s, true.latency_s) for pair, (found, true) in links.items()}
    s_per_byte = {
        pair: (1 / found.bandwidth_bytes_per_s, 1 / true.bandwidth_bytes_per_s) for pair, (found, true) in links.items()
    }
    software_s, software_s_per_byte = _excess(latency_s.values()), _excess(s_per_byte.values())
    return EstimateErrors(
        speed,
        {pair: found / true - 1 for pair, (found, true) in latency_s.items()},
        {pair: true / found - 1 for pair, (found, true) in s_per_byte.items()},
        {pair: (found - software_s) / true - 1 for pair, (found, true) in latency_s.items()},
        {
            pair: true / (found - software_s_per_byte) - 1
            for pair, (found, true) in s_per_byte.items()
            if found > software_s_per_byte
        },
        software_s,
        software_s_per_byte,
    )


def _links(
    cluster: ClusterConfig, cost: CostModel, estimates: Estimates, changed: Mapping[Pair, LinkState]
) -> dict[Pair, tuple[LinkState, LinkState]]:
    """Each link in each direction, as it is estimated and as it truly is."""
    known = {(each.node, each.peer): each for each in estimates.links}
    links = {}
    for pair in itertools.permutations(cluster.node_names, 2):
        shape, model, link = cluster.link(*pair), cost.link(*pair), known.get(pair, LinkEstimate(*pair))
        if shape and model and shape.latency:
            true = changed.get(pair_of(pair), LinkState(shape.latency, shape.bandwidth))
            latency_s = model.latency_s * link.latency_factor
            links[pair] = LinkState(latency_s, model.bandwidth_bytes_per_s / link.s_per_byte_factor), true
    return links


def _excess(times: Iterable[tuple[float, float]]) -> float:
    """The median of what is measured above what is true; 0 if that is less, or if nothing is known."""
    return max(0.0, statistics.median([found - true for found, true in times] or [0.0]))


def _steps_s(node: NodeConfig, features: Iterable[BlockFeatures], cost: CostModel) -> tuple[float, float] | None:
    """Predicted and declared seconds of a decode step through the whole chain; None where one is not known."""
    if node.emulate is None or node.name not in cost.reference_s:
        return None
    parts = node.emulate.decode_per_token.parts()
    known = [feature for feature in features if feature.kind in parts]
    predicted = [float(cost.pass_s(each, node.name, "decode", 1, _CONTEXT_TOKENS)[0]) for each in known]
    return sum(predicted), sum(sum(parts[each.kind]) for each in known)
