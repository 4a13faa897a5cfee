"""The cost model of a simulated cluster: the times that its file declares, as a profile would measure them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from resplit.config import ClusterConfig, LinkShape
from resplit.cost import CostModel, LinkModel, PassModel, PredictionError
from resplit.cost.model import PHASES, Phase
from resplit.node.emulation import ONE_STEP, Hardware, Load
from resplit.types import BlockFeatures

__all__ = ["declared_cost_model"]


def declared_cost_model(
    cluster: ClusterConfig,
    features: Sequence[BlockFeatures],
    hardware: Mapping[str, Hardware],
    shape: Callable[[str, str], LinkShape | None],
    hop_s: float,
    error: float,
    rng: np.random.Generator,
) -> CostModel:
    """The cost model of `cluster` with the present times of its nodes and links, each off by `error` at random.

    `hardware` are the nodes, `shape` gives the link of a pair, to which `hop_s` of software is added.

    A pass over n sessions takes F + m n: these are the coefficients of "pass" and of "tokens" in `cost/features.py`.
    """
    kinds = list(dict.fromkeys(feature.kind for feature in features))
    reference_s = {name: own.node_s("layer") for name, own in hardware.items()}
    nodes = [
        _pass_model(name, phase, kind, own, float(np.exp(rng.normal(0.0, error))), error)
        for name, own in hardware.items()
        for phase in PHASES
        for kind in kinds
    ]
    pooled = [_pooled(nodes, phase, kind, reference_s) for phase in PHASES for kind in kinds]
    shared = [replace(next(each for each in pooled if each.phase == phase), kind=None) for phase in PHASES]
    found = PredictionError(error, 2 * error, len(nodes))
    return CostModel(
        fitted_at_s=0.0,
        reference_s=reference_s,
        passes=(*shared, *pooled, *nodes),
        links=_links(cluster, shape, hop_s, error, rng),
        held_out_contexts=found,
        held_out_nodes=found,
        emulated=tuple(hardware),
    )


def _pass_model(node: str, phase: Phase, kind: str, hardware: Hardware, factor: float, error: float) -> PassModel:
    one_s, two_s = (
        (hardware.node_s(kind, ONE_STEP), hardware.node_s(kind, Load(2, 0)))
        if phase == "decode"
        else (hardware.node_s(kind, Load(0, 1)), hardware.node_s(kind, Load(0, 2)))
    )
    each_s = two_s - one_s
    coefficients = tuple(factor * value for value in (one_s - each_s, each_s, 0.0, 0.0, 0.0))
    return PassModel(node, phase, kind, coefficients, tuple(error * value for value in coefficients), 1, error)


def _pooled(nodes: Sequence[PassModel], phase: Phase, kind: str, reference_s: Mapping[str, float]) -> PassModel:
    """The median over the nodes, in units of their reference layer."""
    fits = [fit for fit in nodes if fit.phase == phase and fit.kind == kind and fit.node is not None]
    columns = zip(*(np.array(fit.coefficients) / reference_s[str(fit.node)] for fit in fits), strict=True)
    coefficients = tuple(statistics.median(map(float, column)) for column in columns)
    return replace(fits[0], node=None, coefficients=coefficients)


def _links(
    cluster: ClusterConfig,
    shape_of: Callable[[str, str], LinkShape | None],
    hop_s: float,
    error: float,
    rng: np.random.Generator,
) -> tuple[LinkModel, ...]:
    links = []
    for node in cluster.node_names:
        for peer in cluster.node_names:
            if (shape := shape_of(node, peer)) is not None:
                latency_factor, byte_factor = map(float, np.exp(rng.normal(0.0, error, 2)))
                latency_s, s_per_byte = latency_factor * (shape.latency + hop_s), byte_factor / shape.bandwidth
                links.append(LinkModel(node, peer, latency_s, s_per_byte, error * latency_s, error * s_per_byte, 2))
    return tuple(links)
