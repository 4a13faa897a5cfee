"""The baseline `latency-dp`: dynamic programming for the least latency of a single request (EdgeShard, algorithm 1).

It ignores queueing. As in the paper, each state keeps one path, and the memory left is that along this path.
"""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Extend the states (atom, node) atom by atom; each keeps its least latency, the memory left and its path."""
    atoms, nodes = instance.shape
    seconds = instance.alone_cost()  # (A, N)
    cost = instance.start.copy()
    left = np.tile(instance.memory_limit, (nodes, 1))  # (state, N)
    paths = np.empty((nodes, atoms), dtype=np.intp)
    here = np.arange(nodes)
    for a in range(atoms):
        if a > 0:
            hop = instance.hop(a).copy()
            np.fill_diagonal(hop, 0)
            arrivals = cost[:, None] + hop
            arrivals[left < instance.memory[a]] = np.inf  # (from, to): no room on `to` along the path of `from`
            origin = arrivals.argmin(axis=0)
            cost, left, paths = arrivals[origin, here], left[origin], paths[origin]
        else:
            cost = np.where(left[here, here] < instance.memory[a], np.inf, cost)
        cost = cost + seconds[a]
        left[here, here] -= instance.memory[a]
        paths[:, a] = here
    total = cost + instance.end
    if not np.isfinite(total).any():
        return Outcome(None, -np.inf, "the dynamic program kept no path with memory for all blocks")
    return Outcome(paths[int(total.argmin())], -np.inf)
