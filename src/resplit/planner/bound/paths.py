"""Cheapest chains of intervals: a placement as a path whose steps are (atoms p..q-1 on node i), by dynamic programming.

Every step pays its own queueing cost as if the node held nothing else, a price for what it uses, and the transfer to
the next step. Knows no solver: the prices come from outside (see `dual`).
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["IntervalPaths", "PathCosts", "Potentials"]


@dataclass(frozen=True)
class PathCosts:
    """What a path pays beside its transfers: `share` (N,), positive, of each interval's own queueing cost; `atom`
    (A, N) per atom; less `link_refund` (N, N) per transfer and `start_refund` (N,) where it begins."""

    share: FloatArray
    atom: FloatArray
    link_refund: FloatArray
    start_refund: FloatArray


@dataclass(frozen=True)
class Potentials:
    """Least costs of the parts of a path, all (A + 1, N). `enter[p, i]`: of all before atom p, node i being next;
    `leave[q, i]`: of all up to atom q - 1 on node i; `ahead[q, i]`: of all that follows a step which ends before atom q
    on node i; `onward[p, i]`: of a step that begins at atom p on node i and all that follows; `prefix`: of the atoms
    before each. `hops`: the transfer matrices, refunds taken off."""

    enter: FloatArray
    leave: FloatArray
    after_leave: FloatArray
    after_enter: FloatArray
    prefix: FloatArray
    hops: list[FloatArray]


class IntervalPaths:
    """All intervals of an instance with the constant part of their cost; infeasible ones cost inf."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        atoms, nodes = instance.shape
        # queue[q][p, i]: queueing cost of atoms p..q-1 alone on node i
        self.queue = [np.empty((0, nodes))] + [self._queue_costs(q) for q in range(1, atoms + 1)]

    def without(self, forbidden: NDArray[np.bool_]) -> IntervalPaths:
        """Without the intervals that have an atom where it is `forbidden` (A, N) from."""
        some = np.vstack((np.zeros(forbidden.shape[1]), forbidden.cumsum(axis=0)))  # (A + 1, N)
        paths = copy(self)
        paths.queue = [np.where(some[q] > some[:q], np.inf, queue) for q, queue in enumerate(self.queue)]
        return paths

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

    def queue_paid(self, nodes_of: IntArray) -> FloatArray:
        """Queueing cost by node (N,) that a path pays at full share, each interval for itself."""
        paid = np.zeros(self.instance.shape[1])
        ends = np.concatenate(([0], np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1, [len(nodes_of)]))
        for p, q in pairwise(ends):
            paid[nodes_of[p]] += self.queue[q][p, nodes_of[p]]
        return paid

    def shortest(self, costs: PathCosts) -> tuple[float, IntArray]:
        """Cost and nodes (A,) of the cheapest path; (inf, ()) where there is none."""
        forward = self._forward(costs)
        atoms = self.instance.shape[0]
        total = forward.leave[atoms] + self.instance.end
        node = int(total.argmin())
        if not np.isfinite(total[node]):
            return float("inf"), np.empty(0, dtype=np.intp)
        cost = float(total[node])
        nodes_of = np.empty(atoms, dtype=np.intp)
        q = atoms
        while q > 0:
            p = int(forward.entered_at[q, node])
            nodes_of[p:q] = node
            q, node = p, int(forward.came_from[p, node])
        return cost, nodes_of

    def potentials(self, costs: PathCosts) -> Potentials:
        """Least costs from both ends, from which the cheapest path through any interval or transfer is read."""
        inst = self.instance
        atoms, nodes = inst.shape
        forward = self._forward(costs)
        prefix, hops = forward.prefix, self._hops(costs)
        after_leave = np.full((atoms + 1, nodes), np.inf)
        after_enter = np.full((atoms + 1, nodes), np.inf)
        after_leave[atoms] = inst.end
        for p in range(atoms - 1, -1, -1):
            steps = np.array([self.queue[q][p] for q in range(p + 1, atoms + 1)])  # (A - p, N)
            after_enter[p] = (costs.share * steps + prefix[p + 1 :] + after_leave[p + 1 :]).min(axis=0) - prefix[p]
            if p > 0:
                after_leave[p] = (hops[inst.hop_of[p]] + after_enter[p]).min(axis=1)
        return Potentials(forward.enter, forward.leave, after_leave, after_enter, prefix, hops)

    def _hops(self, costs: PathCosts) -> list[FloatArray]:
        return [hop - costs.link_refund for hop in self.instance.hops]

    def _forward(self, costs: PathCosts) -> _Forward:
        inst = self.instance
        atoms, nodes = inst.shape
        hops = self._hops(costs)
        prefix = np.vstack([np.zeros(nodes), (costs.atom + inst.fixed).cumsum(axis=0)])  # (A + 1, N)
        enter = np.full((atoms + 1, nodes), np.inf)
        leave = np.full((atoms + 1, nodes), np.inf)
        entered_at = np.zeros((atoms + 1, nodes), dtype=np.intp)
        came_from = np.zeros((atoms + 1, nodes), dtype=np.intp)
        columns = np.arange(nodes)
        reduced = np.empty((atoms, nodes))  # enter - prefix
        enter[0] = inst.start - costs.start_refund
        for q in range(1, atoms + 1):
            reduced[q - 1] = enter[q - 1] - prefix[q - 1]
            steps = costs.share * self.queue[q] + reduced[:q]
            entered_at[q] = steps.argmin(axis=0)
            leave[q] = steps[entered_at[q], columns] + prefix[q]
            if q < atoms:
                arrivals = leave[q][:, None] + hops[inst.hop_of[q]]
                came_from[q] = arrivals.argmin(axis=0)
                enter[q] = arrivals[came_from[q], columns]
        return _Forward(prefix, enter, leave, entered_at, came_from)


@dataclass(frozen=True)
class _Forward:
    """One sweep from the front: prefix sums of atom costs, least costs (see `Potentials`) and where they came from."""

    prefix: FloatArray
    enter: FloatArray
    leave: FloatArray
    entered_at: IntArray
    came_from: IntArray
