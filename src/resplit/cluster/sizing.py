"""What a model needs on the nodes of a cluster file, before anything runs: memory, room for caches, and the speed.

Nothing is started. Emulated nodes have the times that the file declares. Real ones count as fast as this machine, on
which one block of each kind is timed, and links that are not declared as `ASSUMED_LINK`.
"""

from __future__ import annotations

import itertools
import math
import platform
from dataclasses import dataclass

import numpy as np
import psutil

from resplit.config import ClusterConfig, LinkShape, NodeConfig
from resplit.model.source import StoredModel
from resplit.node.emulation import Hardware, Load
from resplit.node.emulation_check import CoreSeconds, measure_work
from resplit.planner.best_effort import solve_best_effort
from resplit.types import BlockFeatures, FloatArray, Node, Plan, Problem, RequestClass, segments_of

ASSUMED_LINK = LinkShape.model_validate({"latency": "1 ms", "bandwidth": "1 Gbit/s"})
_MIB = 2**20


@dataclass(frozen=True)
class NodeNeed:
    """What a plan places on a node: its blocks in words, and the bytes of their weights and caches."""

    name: str
    blocks: str
    needed_bytes: float
    memory_bytes: float


@dataclass(frozen=True)
class Sizing:
    """What serving a model takes. `reason` says why it does not fit; then there are no nodes and no speed.

    `token_s` are the seconds from one token to the next of a single session, `class_latency_s` those of a request of
    each class in the expected load. `measured` says whether times were measured here. `note` says what is not kept.
    """

    model: str
    blocks: int
    weight_bytes: float
    kv_bytes_per_token: float
    kv_tokens: int
    nodes: tuple[NodeNeed, ...]
    token_s: float
    class_latency_s: dict[str, float]
    measured: bool
    note: str
    reason: str | None


def this_machine(context_tokens: int) -> ClusterConfig:
    """A cluster of this machine alone, for sessions of half a context of prompt and half of new tokens."""
    half = max(1.0, context_tokens / 2)
    return ClusterConfig.model_validate(
        {
            "name": "alone",
            "source": "this",
            "trusted": ["this"],
            "nodes": [{"name": "this", "memory": f"{psutil.virtual_memory().total} B"}],
            "classes": [{"name": "chat", "rate_rps": 1e-6, "prompt_tokens": half, "new_tokens": half}],
            "kv_tokens": 1,
        }
    )


def for_users(cluster: ClusterConfig, users: int, context_tokens: int) -> ClusterConfig:
    """The cluster with room for the caches of so many users at once, each with a full context."""
    limits = cluster.limits.model_copy(update={"context_tokens": context_tokens, "sessions": users})
    return cluster.model_copy(update={"kv_tokens": users * context_tokens, "limits": limits})


def size(cluster: ClusterConfig, model: StoredModel, time_limit_s: float = 10.0) -> Sizing:
    """Plan for the declared demand of `cluster`, with the room for caches that it reserves."""
    features = model.features(cluster.private_layers)
    real = any(node.emulate is None for node in cluster.nodes)
    problem = _problem(cluster, features, measure_work(cluster, model) if real else {})
    found = solve_best_effort(problem, time_limit_s)
    plan = found.plan
    return Sizing(
        model=model.name,
        blocks=len(features),
        weight_bytes=sum(each.weight_bytes for each in features),
        kv_bytes_per_token=sum(each.kv_bytes_per_token for each in features),
        kv_tokens=cluster.kv_tokens,
        nodes=_needs(problem, plan, features),
        token_s=_token_s(problem, plan, cluster.source),
        class_latency_s=plan.class_latency_s,
        measured=real,
        note=found.note,
        reason=None if plan.placement else plan.reason or "no plan was found in time",
    )


def describe(found: Sizing) -> str:
    """A sizing as text for people."""
    lines = [
        f"{found.model}: {found.blocks} blocks, {found.weight_bytes / _MIB:.1f} MiB of weights, "
        f"{found.kv_bytes_per_token / 1024:.1f} KiB of cache for each token",
        f"kv_tokens: {found.kv_tokens}, {found.kv_tokens * found.kv_bytes_per_token / _MIB:.1f} MiB of caches in all",
    ]
    if found.reason:
        return "\n".join([*lines, f"does not fit: {found.reason}"])
    lines += [
        f"  {need.name:10} memory: {math.ceil(need.needed_bytes / _MIB)} MiB needed, "
        f"{need.memory_bytes / _MIB:.0f} MiB declared  {need.blocks or 'no blocks'}"
        for need in found.nodes
    ]
    how = f"as this machine ({platform.machine()}) computes" if found.measured else "as the file declares"
    latency = ", ".join(f"{name} in {seconds:.2f} s" for name, seconds in found.class_latency_s.items())
    lines.append(f"fits: {1 / found.token_s:.1f} tokens/s for one user, requests of {latency} ({how})")
    return "\n".join([*lines, *([found.note] if found.note else [])])


def _problem(cluster: ClusterConfig, features: tuple[BlockFeatures, ...], work_s: CoreSeconds) -> Problem:
    prefill, decode = (
        np.array([[_block_s(node, each.kind, decoding, work_s) for node in cluster.nodes] for each in features])
        for decoding in (False, True)
    )  # (J, N) each
    latency, bandwidth = _links(cluster)
    return Problem(
        blocks=tuple(each.block() for each in features),
        nodes=tuple(_node(cluster, node) for node in cluster.nodes),
        classes=tuple(
            RequestClass(each.name, cluster.source, each.rate_rps, each.prompt_tokens, each.new_tokens, each.slo)
            for each in cluster.classes
        ),
        prefill_s_per_token=prefill,
        decode_s_per_token=decode,
        link_latency_s=latency,
        link_bandwidth_bytes_per_s=bandwidth,
        kv_tokens=float(cluster.kv_tokens),
        weights=cluster.objective.values(),
    )


def _block_s(node: NodeConfig, kind: str, decoding: bool, work_s: CoreSeconds) -> float:
    """Seconds of one token through a block of this kind: declared, or the most that a pass took here."""
    if node.emulate:
        hardware = Hardware.declared(node.emulate)
        return hardware.node_s(kind) if decoding else hardware.node_s(kind, Load(0, 64)) / 64
    return max(
        spent_s / shape.tokens
        for (measured, shape), spent_s in work_s.items()
        if measured == kind and shape.decoding == decoding
    )


def _node(cluster: ClusterConfig, node: NodeConfig) -> Node:
    background = node.emulate.background_utilization if node.emulate else 0.0
    return Node(
        node.name,
        node.memory,
        background,
        node.max_utilization,
        node.name in cluster.trusted,
        compute_w=node.compute_w or 0.0,
    )


def _links(cluster: ClusterConfig) -> tuple[FloatArray, FloatArray]:
    """Latency and bandwidth (N, N) of the links from row to column; NaN on the diagonal."""
    names = cluster.node_names
    latency = np.full((len(names), len(names)), np.nan)
    bandwidth = latency.copy()
    for i, node in enumerate(names):
        for k, peer in enumerate(names):
            if i != k:
                link = cluster.link(node, peer) or ASSUMED_LINK
                latency[i, k], bandwidth[i, k] = link.latency, link.bandwidth
    return latency, bandwidth


def _needs(problem: Problem, plan: Plan, features: tuple[BlockFeatures, ...]) -> tuple[NodeNeed, ...]:
    if plan.placement is None:
        return ()
    needed = dict.fromkeys((node.name for node in problem.nodes), 0.0)
    for block, node in zip(problem.blocks, plan.placement, strict=True):
        needed[node] += block.weight_bytes + problem.kv_tokens * block.kv_bytes_per_token
    runs: dict[str, list[str]] = {node.name: [] for node in problem.nodes}
    for each in segments_of(plan.placement):
        runs[each.node].append(f"{features[each.first].name}..{features[each.last].name}")
    return tuple(
        NodeNeed(node.name, ", ".join(runs[node.name]), needed[node.name], node.memory_bytes) for node in problem.nodes
    )


def _token_s(problem: Problem, plan: Plan, source: str) -> float:
    """Seconds of a decode step of a single session: its blocks, and the links of its route and back to the gateway."""
    if plan.placement is None:
        return math.nan
    at = [problem.node_index(node) for node in plan.placement]
    computed_s = sum(problem.decode_s_per_token[block, node] for block, node in enumerate(at))
    route = [problem.node_index(source), *at, problem.node_index(source)]
    hops_s = sum(problem.link_latency_s[a, b] for a, b in itertools.pairwise(route) if a != b)
    return float(computed_s + hops_s)
