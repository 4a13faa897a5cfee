"""Cheapest chains of intervals: a placement as a path whose steps are (atoms p..q-1 on node i), by dynamic programming.

Every step pays its own queueing cost as if the node held nothing else, a price for what it uses, and the transfer to
the next step. Knows no solver: the prices come from outside (see `dual`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["IntervalPaths", "Potentials"]


@dataclass(frozen=True)
class Potentials:
    """Least costs of the parts of a path. `enter[p, i]`: of all before atom p, node i being next; `leave[q, i]`: of all
    up to atom q - 1 on node i; `ahead[q, i]`: of all that follows a step which ends before atom q on node i;
    `onward[p, i]`: of a step that begins at atom p on node i and all that follows. All (A + 1, N)."""

    enter: FloatArray
    leave: FloatArray
    ahead: FloatArray
    onward: FloatArray


class IntervalPaths:
    """All intervals of an instance with the constant part of their cost; infeasible ones cost inf."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        atoms, nodes = instance.shape
        # queue[q][p, i]: queueing cost of atoms p..q-1 alone on node i
        self.queue = [np.empty((0, nodes))] + [self._queue_costs(q) for q in range(1, atoms + 1)]

    def _queue_costs(self, q: int) -> FloatArray:
        inst = self.instance
        load = inst.load_prefix[q] - inst.load_prefix[:q]  # (q, N)
        memory = inst.memory_prefix[q] - inst.memory_prefix[:q]
        fits = (
            (load <= inst.headroom)
            & (memory[:, None] <= inst.memory_limit)
            & (inst.blocked_prefix[q] == inst.blocked_prefix[:q])
        )
        return np.where(fits, inst.queue_cost(np.where(fits, load, 0)), np.inf)

    def shortest(self, share: FloatArray, price: FloatArray) -> tuple[float, IntArray]:
        """Cost and nodes (A,) of the cheapest path where an interval costs `share` (N,) of its own queueing cost plus
        `price` (A, N) of its atoms; `share` must be positive. (inf, ()) where there is no path."""
        prefix, enter, leave, entered_at, came_from = self._forward(share, price)
        del prefix, enter
        atoms = self.instance.shape[0]
        total = leave[atoms] + self.instance.end
        node = int(total.argmin())
        if not np.isfinite(total[node]):
            return float("inf"), np.empty(0, dtype=np.intp)
        nodes_of = np.empty(atoms, dtype=np.intp)
        q = atoms
        while q > 0:
            p = int(entered_at[q, node])
            nodes_of[p:q] = node
            q, node = p, int(came_from[p, node])
        return float(total.min()), nodes_of

    def potentials(self, share: FloatArray, price: FloatArray) -> Potentials:
        """Least costs from both ends, from which the cheapest path through any interval or transfer is read."""
        inst = self.instance
        atoms, nodes = inst.shape
        prefix, enter, leave, _, _ = self._forward(share, price)
        ahead = np.full((atoms + 1, nodes), np.inf)
        onward = np.full((atoms + 1, nodes), np.inf)
        ahead[atoms] = inst.end
        for p in range(atoms - 1, -1, -1):
            steps = np.array([self.queue[q][p] for q in range(p + 1, atoms + 1)])  # (A - p, N)
            onward[p] = (share * steps + prefix[p + 1 :] + ahead[p + 1 :]).min(axis=0) - prefix[p]
            if p > 0:
                ahead[p] = (inst.hop(p) + onward[p]).min(axis=1)
        return Potentials(enter, leave, ahead, onward)

    def _forward(
        self, share: FloatArray, price: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray, IntArray, IntArray]:
        inst = self.instance
        atoms, nodes = inst.shape
        prefix = np.vstack([np.zeros(nodes), (price + inst.fixed).cumsum(axis=0)])  # (A + 1, N)
        enter = np.full((atoms + 1, nodes), np.inf)
        leave = np.full((atoms + 1, nodes), np.inf)
        entered_at = np.zeros((atoms + 1, nodes), dtype=np.intp)
        came_from = np.zeros((atoms + 1, nodes), dtype=np.intp)
        columns = np.arange(nodes)
        reduced = np.empty((atoms, nodes))  # enter - prefix
        enter[0] = inst.start
        for q in range(1, atoms + 1):
            reduced[q - 1] = enter[q - 1] - prefix[q - 1]
            steps = share * self.queue[q] + reduced[:q]
            entered_at[q] = steps.argmin(axis=0)
            leave[q] = steps[entered_at[q], columns] + prefix[q]
            if q < atoms:
                arrivals = leave[q][:, None] + inst.hop(q)
                came_from[q] = arrivals.argmin(axis=0)
                enter[q] = arrivals[came_from[q], columns]
        return prefix, enter, leave, entered_at, came_from
