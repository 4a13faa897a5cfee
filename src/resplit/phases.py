"""The phases of a scenario: what truly holds between two of its changes, and the problem that it makes.

Whoever plays a scenario needs the phases: a workload, the simulator and a policy that knows everything beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from resplit.config import ClusterConfig
from resplit.errors import ConfigError
from resplit.scenario import LinkChange, LoadChange, NodeChange, ScenarioConfig
from resplit.types import Problem

__all__ = ["LinkState", "NodeState", "Pair", "Phase", "declared_phase", "pair_of", "phases_of", "problem_in"]

Pair = tuple[str, str]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class NodeState:
    """A node during a phase: the factor on its declared times, the share that others use, whether it runs."""

    slowdown: float = 1.0
    background_utilization: float = 0.0
    up: bool = True


@dataclass(frozen=True)
class LinkState:
    """A link during a phase, in each direction."""

    latency_s: float
    bandwidth_bytes_per_s: float
    loss: float = 0.0
    up: bool = True


@dataclass(frozen=True)
class Phase:
    """What holds from `at_s` on (seconds from the start of the workload): nodes, links and requests per second.

    `labels` are the changes with which it begins, `changed` the nodes and links that they concern, `came_or_went` those
    nodes that return or are lost. `links` has an entry for each pair that ever changes, in alphabetical order; the
    others are as the cluster file declares.
    """

    at_s: float
    labels: tuple[str, ...]
    changed: frozenset[str | Pair]
    nodes: Mapping[str, NodeState]
    links: Mapping[Pair, LinkState]
    rates_rps: Mapping[str, float]
    came_or_went: frozenset[str] = frozenset()


def pair_of(between: Pair) -> Pair:
    """The same pair for both directions: its names in alphabetical order."""
    one, other = sorted(between)
    return one, other


def phases_of(cluster: ClusterConfig, scenario: ScenarioConfig) -> list[Phase]:
    """The phases of a scenario in order. The first one begins at 0, as declared unless changes are due at 0.

    ConfigError if a link changes that the cluster file does not declare.
    """
    changes: list[NodeChange | LinkChange | LoadChange] = [*scenario.nodes, *scenario.links, *scenario.load]
    phase = declared_phase(cluster, scenario)
    phases = [phase]
    for at_s in sorted({change.at for change in changes}):
        now = [change for change in changes if change.at == at_s]
        phase = _after(replace(phase, at_s=at_s, labels=(), changed=frozenset()), now)
        phases = [phase] if at_s == 0 else [*phases, phase]
    return phases


def problem_in(problem: Problem, phase: Phase, declared: Phase) -> Problem:
    """`problem`, which was posed while `declared` held, as it truly is in `phase`.

    Times and bandwidths scale, background load and latency are added to, rates are those of the phase. A node that is
    down runs no block; a link that is down connects nothing.
    """
    names = [node.name for node in problem.nodes]
    before = [declared.nodes[name] for name in names]
    after = [phase.nodes[name] for name in names]
    factor = np.array([b.slowdown / a.slowdown if b.up else np.nan for a, b in zip(before, after, strict=True)])
    latency_s, bandwidth = problem.link_latency_s.copy(), problem.link_bandwidth_bytes_per_s.copy()
    for pair, link in phase.links.items():
        was, (i, j) = declared.links[pair], map(names.index, pair)
        ends = ([i, j], [j, i])  # both directions
        latency_s[ends] += link.latency_s - was.latency_s if link.up else np.nan
        bandwidth[ends] *= link.bandwidth_bytes_per_s / was.bandwidth_bytes_per_s if link.up else np.nan
    rise = [b.background_utilization - a.background_utilization for a, b in zip(before, after, strict=True)]
    nodes = tuple(
        replace(node, background_utilization=float(np.clip(node.background_utilization + more, 0.0, 0.99)))
        for node, more in zip(problem.nodes, rise, strict=True)
    )
    return replace(
        problem,
        nodes=nodes,
        classes=tuple(replace(each, rate_rps=phase.rates_rps[each.name]) for each in problem.classes),
        prefill_s_per_token=problem.prefill_s_per_token * factor,
        decode_s_per_token=problem.decode_s_per_token * factor,
        link_latency_s=latency_s,
        link_bandwidth_bytes_per_s=bandwidth,
    )


def declared_phase(cluster: ClusterConfig, scenario: ScenarioConfig) -> Phase:
    """Nodes, links and rates as the cluster file declares them. ConfigError as `phases_of`."""
    nodes = {
        node.name: NodeState(background_utilization=node.emulate.background_utilization if node.emulate else 0.0)
        for node in cluster.nodes
    }
    pairs = sorted({pair_of(change.between) for change in scenario.links})
    rates = {declared.name: declared.rate_rps for declared in cluster.classes}
    return Phase(0.0, (), frozenset(), nodes, {pair: _declared_link(cluster, pair) for pair in pairs}, rates)


def _declared_link(cluster: ClusterConfig, pair: Pair) -> LinkState:
    shape = cluster.link(*pair)
    if shape is None:
        raise ConfigError(f"{cluster.name}: links", f"{' and '.join(pair)} have no emulated link that could change")
    return LinkState(shape.latency, shape.bandwidth)


def _after(phase: Phase, changes: list[NodeChange | LinkChange | LoadChange]) -> Phase:
    nodes, links, rates = dict(phase.nodes), dict(phase.links), dict(phase.rates_rps)
    changed: set[str | Pair] = set()
    for change in changes:
        match change:
            case NodeChange():
                nodes[change.node] = _node_after(nodes[change.node], change)
                changed.add(change.node)
            case LinkChange():
                pair = pair_of(change.between)
                links[pair] = _link_after(links[pair], change)
                changed.add(pair)
            case LoadChange():
                rates[change.request_class] = change.rate_rps
    labels = tuple(dict.fromkeys(change.label for change in changes))
    moved = frozenset(name for name in nodes if nodes[name].up != phase.nodes[name].up)
    return Phase(phase.at_s, labels, frozenset(changed), nodes, links, rates, moved)


def _node_after(node: NodeState, change: NodeChange) -> NodeState:
    return NodeState(
        _or(change.slowdown, node.slowdown),
        _or(change.background_utilization, node.background_utilization),
        _or(change.up, node.up),
    )


def _link_after(link: LinkState, change: LinkChange) -> LinkState:
    return LinkState(
        _or(change.latency, link.latency_s),
        _or(change.bandwidth, link.bandwidth_bytes_per_s),
        _or(change.loss, link.loss),
        _or(change.up, link.up),
    )


def _or(value: _Value | None, otherwise: _Value) -> _Value:
    return otherwise if value is None else value
