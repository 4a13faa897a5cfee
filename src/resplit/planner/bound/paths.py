"""Pricing by dynamic programming: the cheapest path of intervals (atoms p..q-1 on node i).

The cost of an interval is its queueing cost as if the node held nothing else, the price of the resources that it uses,
and the transfer to the next interval.
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
    """The costs of a path at given prices, besides its transfers.

    `share` (N,), positive, is the share of each interval's queueing cost; `atom` (A, N) the price per atom.
    `link_refund` (N, N) is subtracted per transfer, `start_refund` (N,) at the start of the path.
    """

    share: FloatArray
    atom: FloatArray
    link_refund: FloatArray
    start_refund: FloatArray


@dataclass(frozen=True)
class Potentials:
    """Least costs of partial paths, all (A + 1, N).

    - `enter[p, i]`: from the start to the beginning of an interval at atom p on node i.
    - `leave[q, i]`: from the start to the end of an interval before atom q on node i.
    - `after_leave[q, i]`, `after_enter[p, i]`: from there to the end of the path.
    - `prefix`: prefix sums of the atoms' costs. `hops`: the transfer matrices less refunds.
    """

    enter: FloatArray
    leave: FloatArray
    after_leave: FloatArray
    after_enter: FloatArray
    prefix: FloatArray
    hops: list[FloatArray]


class IntervalPaths:
    """All intervals of an instance with the part of their cost that does not depend on prices; inf if infeasible."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        atoms, nodes = instance.shape
        # queue[q][p, i]: queueing cost of atoms p..q-1 alone on node i
        self.queue = [np.empty((0, nodes))] + [self._queue_costs(q) for q in range(1, atoms + 1)]

    def without(self, forbidden: NDArray[np.bool_]) -> IntervalPaths:
        """The paths without intervals that contain a `forbidden` (A, N) pair of atom and node."""
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
        """Queueing cost of a path by node (N,), each interval counted alone, at a share of 1."""
        paid = np.zeros(self.instance.shape[1])
        ends = np.concatenate(([0], np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1, [len(nodes_of)]))
        for p, q in pairwise(ends):
            paid[nodes_of[p]] += self.queue[q][p, nodes_of[p]]
        return paid

    def shortest(self, costs: PathCosts) -> tuple[float, IntArray]:
        """Cost and nodes (A,) of the cheapest path; (inf, ()) if there is none. O(N A^2 + A N^2)."""
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
        """Least costs from both ends, which give the cheapest path through any interval or transfer."""
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
    """The forward pass: least costs (see `Potentials`) and their predecessors."""

    prefix: FloatArray
    enter: FloatArray
    leave: FloatArray
    entered_at: IntArray
    came_from: IntArray
