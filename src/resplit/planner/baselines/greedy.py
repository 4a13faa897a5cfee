"""The baseline `greedy`: places blocks in model order, each on the feasible node that raises the objective least."""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Place the atoms without backtracking. This fails if no node has room for the next one."""
    atoms, nodes = instance.shape
    load, left = np.zeros(nodes), instance.memory_limit.copy()
    nodes_of = np.empty(atoms, dtype=np.intp)
    for a in range(atoms):
        if a == 0:
            transfer = instance.start
        else:
            transfer = instance.hop(a)[nodes_of[a - 1]].copy()
            transfer[nodes_of[a - 1]] = 0
        new_load = load + instance.load[a]
        fits = (new_load <= instance.headroom) & (left >= instance.memory[a])
        within = np.where(fits, new_load, 0)
        rise = instance.queue_cost(within) - instance.queue_cost(load)
        peak = np.maximum(instance.background + within, (instance.background + load).max())
        cost = np.where(fits, transfer + instance.fixed[a] + rise + instance.balance_weight * peak, np.inf)
        if a == atoms - 1:
            cost = cost + instance.end
        node = int(cost.argmin())
        if not np.isfinite(cost[node]):
            block = instance.problem.blocks[instance.first[a]].name
            return Outcome(None, -np.inf, f"no linked node has room left for block {block}")
        nodes_of[a] = node
        load[node] += instance.load[a, node]
        left[node] -= instance.memory[a]
    return Outcome(nodes_of, -np.inf)
