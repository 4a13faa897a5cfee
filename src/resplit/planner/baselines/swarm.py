"""The baseline `swarm`: each node joins where throughput is least, then requests take the fastest route (Petals).

The blocks of several nodes may overlap; blocks that the route does not use stay unused.
"""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome
from resplit.types import FloatArray

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Nodes join in the order of the problem; the route is a shortest path over the blocks that they serve."""
    atoms, nodes = instance.shape
    served = np.zeros((atoms, nodes), dtype=bool)
    throughput = np.zeros(atoms)
    for i in range(nodes):
        span = _weakest_span(instance, i, throughput)
        if span is not None:
            served[span[0] : span[1], i] = True
            load = instance.load_prefix[span[1], i] - instance.load_prefix[span[0], i]
            throughput[span[0] : span[1]] += max(instance.headroom[i], 0) / max(load, 1e-12)
    route = _fastest_route(instance, served)
    if route is None:
        return Outcome(None, -np.inf, "the nodes that joined do not serve every block on linked nodes")
    return Outcome(route, -np.inf)


def _weakest_span(instance: Instance, i: int, throughput: FloatArray) -> tuple[int, int] | None:
    """Of the longest runs of blocks that fit on node i, the one that contains the block of least throughput."""
    atoms = instance.shape[0]
    spans = []
    for p in range(atoms):
        room = instance.memory_prefix - instance.memory_prefix[p] <= instance.memory_limit[i]
        runs = instance.blocked_prefix[:, i] == instance.blocked_prefix[p, i]
        q = int(np.flatnonzero(room & runs)[-1])
        if q > p:
            spans.append((float(throughput[p:q].min()), float(throughput[p:q].mean()), p - q, p, q))
    if not spans:
        return None
    *_, p, q = min(spans)
    return p, q


def _fastest_route(instance: Instance, served: np.ndarray) -> IntArray | None:
    """The node of each atom (A,) on the shortest path over the `served` (A, N) pairs; None if there is none."""
    seconds = np.where(served, instance.alone_cost(), np.inf)
    atoms, nodes = instance.shape
    cost = instance.start + seconds[0]
    origins = np.empty((atoms, nodes), dtype=np.intp)
    for a in range(1, atoms):
        hop = instance.hop(a).copy()
        np.fill_diagonal(hop, 0)
        arrivals = cost[:, None] + hop
        origins[a] = arrivals.argmin(axis=0)
        cost = arrivals.min(axis=0) + seconds[a]
    total = cost + instance.end
    if not np.isfinite(total).any():
        return None
    nodes_of = np.empty(atoms, dtype=np.intp)
    nodes_of[-1] = total.argmin()
    for a in range(atoms - 1, 0, -1):
        nodes_of[a - 1] = origins[a, nodes_of[a]]
    return nodes_of
