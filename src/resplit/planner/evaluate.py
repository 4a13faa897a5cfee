"""Evaluates a given placement: its objective, its terms and the constraints it violates (docs/problem.md).

Every number in an answer is computed here, whichever solver found the placement.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from resplit.privacy import exposed_blocks
from resplit.types import FloatArray, Problem, RequestClass, Terms
from resplit.units import shown_bytes, shown_exactly

__all__ = ["Evaluation", "Violation", "block_bytes", "evaluate", "moved_bytes", "slo_shortfall_s"]

SLACK = 1e-9  # relative; allows for rounding errors of sums

ViolationKind = Literal["memory", "utilization", "privacy", "cannot_run", "link", "cut"]


@dataclass(frozen=True)
class Violation:
    """A constraint that a placement violates; `text` describes it.

    For memory (bytes) and utilisation (share of the node), `excess` is the amount above `limit`; both are 0 otherwise.
    """

    kind: ViolationKind
    text: str
    excess: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The costs of one placement and the constraints it violates.

    For each class, in seconds (R,): `compute_s` is the node time of one request, `queueing_s` the waiting time added
    to it, `network_s` the time of its transfers. `utilization` (N,) is u_i, the background included.
    """

    objective: float
    terms: Terms
    utilization: FloatArray
    compute_s: FloatArray
    queueing_s: FloatArray
    network_s: FloatArray
    violations: tuple[Violation, ...]

    @property
    def class_latency_s(self) -> FloatArray:
        """Mean latency of one request of each class, in seconds (R,)."""
        latency: FloatArray = self.compute_s + self.queueing_s + self.network_s
        return latency


def evaluate(problem: Problem, placement: Sequence[str]) -> Evaluation:
    """Evaluate `placement`, one node name per block: the objective (eq. 3), its terms and the violated constraints.

    The latency is infinite if a node has a utilisation of 1 or more. Raises KeyError for a node that is not in the
    problem.
    """
    index = {node.name: i for i, node in enumerate(problem.nodes)}
    nodes_of = np.array([index[name] for name in placement])  # (J,)
    rates = np.array([c.rate_rps for c in problem.classes])
    service = _service_s(problem, nodes_of)  # (R, J)
    background = np.array([node.background_utilization for node in problem.nodes])
    busy = np.bincount(nodes_of, rates @ service, len(problem.nodes))  # node seconds per second (N,)
    load = np.array([node.load_share for node in problem.nodes]) * busy
    utilization: FloatArray = background + load
    network = np.array([_network_s(problem, request_class, nodes_of) for request_class in problem.classes])
    slowdown = _reciprocal(1 - utilization)  # (N,)
    compute = service.sum(axis=1)
    with np.errstate(invalid="ignore"):
        queueing = np.where(service > 0, service * slowdown[nodes_of], 0).sum(axis=1) - compute
        requests = np.where(busy > 0, busy * slowdown, 0)  # in progress on each node (N,), by Little's law
    terms = Terms(
        latency_s=float((requests.sum() + rates @ network) / rates.sum()),
        balance=float(utilization.max()),
        privacy=_privacy(problem, nodes_of),
        energy_j=float(np.array([node.compute_w for node in problem.nodes]) @ load / rates.sum()),
    )
    weights = problem.weights
    weighted = zip(
        (weights.latency, weights.balance, weights.privacy, weights.energy),
        (terms.latency_s, terms.balance, terms.privacy, terms.energy_j),
        strict=True,
    )
    objective = sum(weight * term for weight, term in weighted if weight > 0)
    violations = _violations(problem, nodes_of, utilization)
    return Evaluation(objective, terms, utilization, compute, queueing, network, violations)


def block_bytes(problem: Problem) -> FloatArray:
    """Memory of each block, weights and reserved cache, in bytes (J,); the left side of eq. 5."""
    return np.array([b.weight_bytes + b.kv_bytes_per_token * problem.kv_tokens for b in problem.blocks])


def moved_bytes(problem: Problem, placement: Sequence[str]) -> float | None:
    """Bytes of weights and caches whose node differs from `problem.current`; None without a current placement."""
    if problem.current is None:
        return None
    moved = np.array([old != new for old, new in zip(problem.current, placement, strict=True)])
    return float(block_bytes(problem)[moved].sum())


def slo_shortfall_s(problem: Problem, evaluation: Evaluation) -> dict[str, float]:
    """Seconds by which each class misses its service objective, by class name; only classes that miss it are listed."""
    return {
        request_class.name: float(latency - request_class.slo_s)
        for request_class, latency in zip(problem.classes, evaluation.class_latency_s, strict=True)
        if request_class.slo_s is not None and latency > request_class.slo_s
    }


def _reciprocal(share_free: FloatArray) -> FloatArray:
    """1 / share_free; infinite where share_free is 0 or less."""
    return np.divide(1.0, share_free, out=np.full_like(share_free, np.inf), where=share_free > 0)


def _service_s(problem: Problem, nodes_of: np.ndarray) -> FloatArray:
    """The service times s[r, j, node(j)] = p_r prefill + g_r decode, in seconds (R, J); 0 if the node lacks a time."""
    blocks = np.arange(len(problem.blocks))
    prompt = np.array([c.prompt_tokens for c in problem.classes])
    new = np.array([c.new_tokens for c in problem.classes])
    prefill = np.nan_to_num(problem.prefill_s_per_token)[blocks, nodes_of]
    decode = np.nan_to_num(problem.decode_s_per_token)[blocks, nodes_of]
    service: FloatArray = np.outer(prompt, prefill) + np.outer(new, decode)
    return service


def _network_s(problem: Problem, request_class: RequestClass, nodes_of: np.ndarray) -> float:
    """The transfer time sum_b t[r, b, i, k] of one request of a class, in seconds; infinite if a link is missing."""
    source = problem.node_index(request_class.source)
    passes = request_class.prompt_tokens + request_class.new_tokens - 1
    sizes = np.array(
        [passes * problem.token_bytes]
        + [passes * block.activation_bytes_per_token for block in problem.blocks[:-1]]
        + [request_class.new_tokens * problem.token_bytes]
    )  # (J + 1,)
    chain = np.concatenate(([source], nodes_of, [source]))
    here, there = chain[:-1], chain[1:]
    seconds = (
        request_class.new_tokens * problem.link_latency_s[here, there]
        + sizes / problem.link_bandwidth_bytes_per_s[here, there]
    )
    return float(np.nan_to_num(seconds[here != there], nan=np.inf).sum())


def _privacy(problem: Problem, nodes_of: np.ndarray) -> float:
    """The privacy term: the sensitivity of the blocks on untrusted nodes, per block of the model."""
    trusted = np.array([node.trusted for node in problem.nodes])
    sensitivity = np.array([block.sensitivity for block in problem.blocks])
    return float(sensitivity[~trusted[nodes_of]].sum() / len(problem.blocks))


def _violations(problem: Problem, nodes_of: np.ndarray, utilization: FloatArray) -> tuple[Violation, ...]:
    return (
        *_exceeded_limits(problem, nodes_of, utilization),
        *_misplaced_blocks(problem, nodes_of),
        *_missing_links(problem, nodes_of),
        *_forbidden_cuts(problem, nodes_of),
    )


def _exceeded_limits(problem: Problem, nodes_of: np.ndarray, utilization: FloatArray) -> Iterator[Violation]:
    need = np.bincount(nodes_of, block_bytes(problem), len(problem.nodes))
    for i in np.unique(nodes_of):
        node = problem.nodes[i]
        if need[i] > node.memory_bytes * (1 + SLACK):
            short = need[i] - node.memory_bytes
            text = (
                f"memory of {node.name}: needs {shown_bytes(need[i])}, has {shown_bytes(node.memory_bytes)}, "
                f"short by {shown_exactly(short)}"
            )
            yield Violation("memory", text, float(short), node.memory_bytes)
        if utilization[i] > node.max_utilization + SLACK:
            text = f"utilization of {node.name}: {utilization[i]:.6f}, at most {node.max_utilization:g}"
            yield Violation("utilization", text, float(utilization[i] - node.max_utilization), node.max_utilization)


def _misplaced_blocks(problem: Problem, nodes_of: np.ndarray) -> Iterator[Violation]:
    """Private blocks on nodes that are not trusted, and blocks on nodes that cannot run them."""
    trusted = {node.name for node in problem.nodes if node.trusted}
    exposed = exposed_blocks([problem.nodes[i].name for i in nodes_of], problem.blocks, trusted)
    for j, (block, i) in enumerate(zip(problem.blocks, nodes_of, strict=True)):
        node = problem.nodes[i]
        if j in exposed:
            yield Violation("privacy", f"trust: private block {block.name} on {node.name}, which is not trusted")
        if np.isnan(problem.prefill_s_per_token[j, i]):
            yield Violation("cannot_run", f"block {block.name} cannot run on {node.name}")


def _missing_links(problem: Problem, nodes_of: np.ndarray) -> Iterator[Violation]:
    ends = [problem.node_index(request_class.source) for request_class in problem.classes]
    hops = {(s, int(nodes_of[0])) for s in ends} | {(int(nodes_of[-1]), s) for s in ends}
    hops |= {(int(i), int(k)) for i, k in itertools.pairwise(nodes_of)}
    for i, k in sorted(hops):
        if i != k and np.isnan(problem.link_latency_s[i, k]):
            yield Violation("link", f"no link from {problem.nodes[i].name} to {problem.nodes[k].name}")


def _forbidden_cuts(problem: Problem, nodes_of: np.ndarray) -> Iterator[Violation]:
    for boundary in np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1:
        if problem.allowed_cuts is not None and boundary not in problem.allowed_cuts:
            yield Violation("cut", f"boundary {boundary} is not an allowed cut")
