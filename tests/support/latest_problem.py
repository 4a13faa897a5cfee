"""The placement problem of a cluster without measurements: all nodes are idle and equally fast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from resplit.config import ClusterConfig
from resplit.types import BlockFeatures, Node, Problem, RequestClass


def problem_of(cluster: ClusterConfig, features: Sequence[BlockFeatures], current: Sequence[str]) -> Problem:
    """The problem that a flow would send to the controller of an idle cluster with the placement `current`."""
    shape, count = (len(features), len(cluster.nodes)), len(cluster.nodes)
    between = np.where(np.eye(count, dtype=bool), np.nan, 1.0)  # (nodes, nodes)
    return Problem(
        blocks=tuple(feature.block() for feature in features),
        nodes=tuple(
            Node(each.name, each.memory, 0.0, each.max_utilization, each.name in cluster.trusted)
            for each in cluster.nodes
        ),
        classes=(RequestClass("chat", cluster.source, 1.0, 8.0, 8.0),),
        prefill_s_per_token=np.full(shape, 1e-4),
        decode_s_per_token=np.full(shape, 1e-4),
        link_latency_s=1e-3 * between,
        link_bandwidth_bytes_per_s=1e8 * between,
        kv_tokens=float(cluster.kv_tokens),
        weights=cluster.objective.values(),
        current=tuple(current),
    )
