"""Builds the placement problem (docs/problem.md) from the cost model and the present state of the cluster."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import structlog

from resplit.config import ClusterConfig
from resplit.cost.model import CostModel
from resplit.cost.per_token import node_times
from resplit.types import BlockFeatures, FloatArray, Node, Problem, RequestClass

__all__ = ["MAX_BACKGROUND", "NodeReading", "node_readings", "problem_from"]

MAX_BACKGROUND = 0.99  # the problem format requires a value below 1
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class NodeReading:
    """The present state of a node: bytes for weights and caches, used or free, and the share that others use."""

    memory_bytes: float
    background_utilization: float


def node_readings(nodes: pd.DataFrame) -> dict[str, NodeReading]:
    """The state of each node, from the reports of a window (columns `telemetry.NODE_COLUMNS`).

    Memory is free + held in the last report. Background utilisation is the median of the node's use minus resplit's
    own, clipped to 0..`MAX_BACKGROUND`; a higher value is logged.
    """
    shared = (nodes["cpu_utilization"] - nodes["own_utilization"]).groupby(nodes["node"], sort=True).median()
    last = nodes.sort_values("time_s", ascending=False, kind="stable").drop_duplicates("node").set_index("node")
    memory_bytes = (last["memory_free_bytes"] + last["memory_held_bytes"]).to_dict()
    return {
        str(node): NodeReading(float(memory_bytes[node]), _clipped(str(node), float(background)))
        for node, background in shared.items()
    }


def _clipped(node: str, background: float) -> float:
    if background > MAX_BACKGROUND:
        _log.warning("background utilization clipped", node=node, seen=background, used=MAX_BACKGROUND)
    return float(np.clip(background, 0.0, MAX_BACKGROUND))


def problem_from(
    model: CostModel,
    features: Sequence[BlockFeatures],
    cluster: ClusterConfig,
    states: Mapping[str, NodeReading],
    classes: Sequence[RequestClass],
    current: Sequence[str] | None = None,
    lost_nodes: Collection[str] = (),
    allowed_cuts: frozenset[int] | None = None,
) -> Problem:
    """The problem of placing `features` on the nodes of `cluster`, in the order of its file, for the demand `classes`.

    A node that is in `lost_nodes`, has no state or is unknown to the model stays in the problem with null for all its
    times. `current` is the current placement; `allowed_cuts` limits the cuts.
    """
    names = cluster.node_names
    usable = np.array([name in states and name in model.reference_s and name not in lost_nodes for name in names])
    times = node_times(model, features, names, classes, _fewest_nodes(cluster, features))
    latency, bandwidth = _link_matrices(model, names, usable)
    return Problem(
        blocks=tuple(feature.block() for feature in features),
        nodes=tuple(
            _node(cluster, name, states.get(name), load_share)
            for name, load_share in zip(names, times.load_share.tolist(), strict=True)
        ),
        classes=tuple(classes),
        prefill_s_per_token=np.where(usable, times.prefill_s_per_token, np.nan),  # (J, N)
        decode_s_per_token=np.where(usable, times.decode_s_per_token, np.nan),  # (J, N)
        link_latency_s=latency,
        link_bandwidth_bytes_per_s=bandwidth,
        kv_tokens=float(cluster.kv_tokens),
        weights=cluster.objective.values(),
        allowed_cuts=allowed_cuts,
        current=None if current is None else tuple(current),
    )


def _fewest_nodes(cluster: ClusterConfig, features: Sequence[BlockFeatures]) -> int:
    """How many of its nodes have the memory for the model, if the largest are taken; all of them if it does not fit."""
    needed = sum(each.weight_bytes + cluster.kv_tokens * each.kv_bytes_per_token for each in features)
    held = itertools.accumulate(sorted((node.memory for node in cluster.nodes), reverse=True))
    return next((count for count, total in enumerate(held, 1) if total >= needed), len(cluster.nodes))


def _node(cluster: ClusterConfig, name: str, state: NodeReading | None, load_share: float) -> Node:
    config = cluster.node(name)
    return Node(
        name=name,
        memory_bytes=config.memory if state is None else state.memory_bytes,
        background_utilization=0.0 if state is None else state.background_utilization,
        max_utilization=config.max_utilization,
        trusted=name in cluster.trusted,
        load_share=load_share,
        compute_w=config.compute_w or 0.0,
    )


def _link_matrices(model: CostModel, names: Sequence[str], usable: np.ndarray) -> tuple[FloatArray, FloatArray]:
    """Latency and bandwidth (N, N) from row to column; NaN on the diagonal and where there is no usable link.

    A pair that was seen in one direction only is assumed to be symmetric.
    """
    index = {name: i for i, name in enumerate(names) if usable[i]}
    latency = np.full((len(names), len(names)), np.nan)
    bandwidth = latency.copy()
    for link in model.links:  # not each pair: most nodes of a large cluster have never met
        i, k = index.get(link.node), index.get(link.peer)
        if i is not None and k is not None and i != k:
            latency[i, k], bandwidth[i, k] = link.latency_s, link.bandwidth_bytes_per_s
    unseen = np.isnan(latency)
    return np.where(unseen, latency.T, latency), np.where(unseen, bandwidth.T, bandwidth)
