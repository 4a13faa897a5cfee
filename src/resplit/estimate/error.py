"""How far the estimate of an emulated cluster is from what the cluster file declares."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resplit.config import ClusterConfig, NodeConfig
from resplit.cost.model import CostModel
from resplit.estimate.cluster import Estimates, NodeEstimate
from resplit.estimate.links import LinkEstimate
from resplit.types import BlockFeatures

__all__ = ["EstimateErrors", "estimate_errors"]

_CONTEXT_TOKENS = 32  # of the decode step that is compared; declared times are the same for all contexts


@dataclass(frozen=True)
class EstimateErrors:
    """Estimated over declared, less 1: of a decode step of one session by node; of latency and bandwidth by link.

    A latency contains the software's time for a message, which no file declares.
    """

    speed: dict[str, float]
    latency: dict[tuple[str, str], float]
    bandwidth: dict[tuple[str, str], float]

    def __str__(self) -> str:
        """The errors as lines of a table: the median and the largest, without their signs."""
        lines = [
            _line("speed of nodes", self.speed.values()),
            _line("latency of links", self.latency.values()),
            _line("bandwidth of links", self.bandwidth.values()),
        ]
        return "\n".join(["| estimate | median error | largest error |", "| --- | --- | --- |", *lines])


def estimate_errors(
    cluster: ClusterConfig, features: Sequence[BlockFeatures], cost: CostModel, estimates: Estimates
) -> EstimateErrors:
    """The errors of the estimates, which are relative to `cost`, while nodes and links are as the file declares.

    `features` are those of the model's chain of blocks. What the model or the file does not know is left out.
    """
    links = {(each.node, each.peer): each for each in estimates.links}
    latency, bandwidth = {}, {}
    for pair in itertools.permutations(cluster.node_names, 2):
        shape, known, link = cluster.link(*pair), cost.link(*pair), links.get(pair, LinkEstimate(*pair))
        if shape and known and shape.latency:
            latency[pair] = known.latency_s * link.latency_factor / shape.latency - 1
            bandwidth[pair] = known.bandwidth_bytes_per_s / link.s_per_byte_factor / shape.bandwidth - 1
    speed = {}
    for node in cluster.nodes:
        factor = estimates.nodes.get(node.name, NodeEstimate()).factor
        steps = _steps_s(node, features, cost)
        if steps:
            speed[node.name] = factor * steps[0] / steps[1] - 1
    return EstimateErrors(speed, latency, bandwidth)


def _steps_s(node: NodeConfig, features: Iterable[BlockFeatures], cost: CostModel) -> tuple[float, float] | None:
    """Predicted and declared seconds of a decode step through the whole chain; None where one is not known."""
    if node.emulate is None or node.name not in cost.reference_s:
        return None
    parts = node.emulate.decode_per_token.parts()
    known = [feature for feature in features if feature.kind in parts]
    predicted = [float(cost.pass_s(each, node.name, "decode", 1, _CONTEXT_TOKENS)[0]) for each in known]
    return sum(predicted), sum(sum(parts[each.kind]) for each in known)


def _line(name: str, errors: Iterable[float]) -> str:
    sizes = [abs(error) for error in errors]
    if not sizes:
        return f"| {name} | - | - |"
    return f"| {name} | {statistics.median(sizes):.1%} | {max(sizes):.1%} |"
