"""Cheapest paths that keep the limits of a few tracked nodes: states count what these hold.

Without it a path may return to a node, exceed its memory in several visits and queue at each as if the others were not;
prices hold that down on average only.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from resplit.planner.instance import IntArray
from resplit.planner.paths import IntervalPaths, PathCosts
from resplit.types import FloatArray

__all__ = ["TrackedPaths"]


class TrackedPaths:
    """`shortest` as in `IntervalPaths`, over the paths that use at most `limit[t]` units on each of `nodes[t]`; `use`
    (A,) whole units by atom. A state counts the units used so far on every tracked node."""

    def __init__(self, paths: IntervalPaths, use: FloatArray, nodes: list[int], limits: list[int]) -> None:
        self.instance = paths.instance
        self.nodes = nodes
        self._paths = paths
        self._use = use
        self._limits = limits
        self._used = np.concatenate(([0], use.astype(np.intp).cumsum()))  # (A + 1,)
        sizes = [limit + 1 for limit in limits]
        self.states = int(np.prod(sizes))
        self._strides = [int(np.prod(sizes[:t])) for t in range(len(sizes))]
        self._levels = [np.arange(self.states) // s % n for s, n in zip(self._strides, sizes, strict=True)]
        atoms = range(self.instance.shape[0] + 1)
        self._sources = [[self._source(t, q) for q in atoms] for t in range(len(nodes))]
        self._least_load = [self._least_loads(t) for t in range(len(nodes))]
        self._queues = [[self._queue_after(t, q) for q in atoms] for t in range(len(nodes))]

    def shortest(self, costs: PathCosts) -> tuple[float, IntArray]:
        """Cost and nodes (A,) of the cheapest path; (inf, ()) where there is none."""
        inst = self.instance
        atoms, n = inst.shape
        hops = [hop - costs.link_refund for hop in inst.hops]
        prefix = np.vstack([np.zeros(n), (costs.atom + inst.fixed).cumsum(axis=0)])
        reduced = np.full((atoms, self.states + 1, n), np.inf)  # enter - prefix; the last state is none
        reduced[0, 0] = inst.start - costs.start_refund
        entered_at = np.zeros((atoms + 1, self.states, n), dtype=np.int32)
        came_from = np.zeros((atoms + 1, self.states, n), dtype=np.int32)
        leave = reduced[0, :-1]
        for q in range(1, atoms + 1):
            leave = self._leave(q, costs.share, reduced[:q], entered_at[q]) + prefix[q]
            if q < atoms:
                arrivals = leave[:, :, None] + hops[inst.hop_of[q]]  # (S, from, to)
                came_from[q] = arrivals.argmin(axis=1)
                enter = np.take_along_axis(arrivals, came_from[q][:, None, :], axis=1)[:, 0]
                reduced[q, :-1] = enter - prefix[q]
        total = leave + inst.end
        state, node = np.unravel_index(int(total.argmin()), total.shape)
        if not np.isfinite(total[state, node]):
            return float("inf"), np.empty(0, dtype=np.intp)
        return float(total[state, node]), self._backtrack(int(state), int(node), entered_at, came_from)

    def _leave(self, q: int, share: FloatArray, reduced: FloatArray, entered_at: np.ndarray) -> FloatArray:
        """Least cost of ending a step at q in each state, on each node (S, N), less the prefix; fills `entered_at`."""
        steps = (share * self._paths.queue[q])[:, None, :] + reduced[:, :-1]  # (q, S, N)
        for t, node in enumerate(self.nodes):
            source = self._sources[t][q]
            steps[:, :, node] = share[node] * self._queues[t][q] + reduced[np.arange(q)[:, None], source, node]
        entered_at[:] = steps.argmin(axis=0)
        return np.asarray(np.take_along_axis(steps, entered_at[None].astype(np.intp), axis=0)[0])

    def _source(self, t: int, q: int) -> IntArray:
        """The state before a step p..q-1 on tracked node t that ends in each state (q, S); the last state is none."""
        units = (self._used[q] - self._used[:q])[:, None]
        possible = self._levels[t] >= units
        return np.where(possible, np.arange(self.states) - units * self._strides[t], self.states)

    def _least_loads(self, t: int) -> FloatArray:
        """Least load on tracked node t of any atoms that make up each number of units (limit + 1,), a knapsack."""
        load = self._paths.instance.load[:, self.nodes[t]]
        least = np.full(self._limits[t] + 1, np.inf)
        least[0] = 0.0
        for units, added in zip(self._use.astype(int), load, strict=True):
            if np.isfinite(added) and 0 < units < len(least):
                least[units:] = np.minimum(least[units:], least[: len(least) - units] + added)
        return least

    def _queue_after(self, t: int, q: int) -> FloatArray:
        """What a step p..q-1 that ends in each state adds to the queueing cost of tracked node t, which holds at least
        the least load of its units already (q, S); for convex costs the true addition is no less."""
        inst, node = self.instance, self.nodes[t]
        units = (self._used[q] - self._used[:q])[:, None]
        level = np.where(self._levels[t] >= units, self._levels[t] - units, 0)
        before = self._least_load[t][level]
        alone = self._paths.queue[q][:, node, None]
        load = (inst.load_prefix[q, node] - inst.load_prefix[:q, node])[:, None]
        fits = np.isfinite(alone) & (before + load <= inst.headroom[node])
        free = 1 - inst.background[node]
        with_it, without = np.where(fits, before + load, 0), np.where(fits, before, 0)
        added = inst.queue_weight * (with_it / (free - with_it) - without / (free - without))
        return np.where(fits, np.maximum(added, 0), np.inf)

    def queue_paid(self, nodes_of: IntArray) -> FloatArray:
        """Queueing cost by node (N,) that a path pays at full share."""
        paid = self._paths.queue_paid(nodes_of)
        ends = np.concatenate(([0], np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1, [len(nodes_of)]))
        for t, node in enumerate(self.nodes):
            state, paid[node] = 0, 0.0
            for p, q in pairwise(ends):
                if nodes_of[p] == node:
                    state += int(self._used[q] - self._used[p])
                    within = state <= self._limits[t]
                    paid[node] += self._queues[t][q][p, state * self._strides[t]] if within else np.inf
        return paid

    def _backtrack(self, state: int, node: int, entered_at: np.ndarray, came_from: np.ndarray) -> IntArray:
        nodes_of = np.empty(self.instance.shape[0], dtype=np.intp)
        q = len(nodes_of)
        while q > 0:
            p = int(entered_at[q, state, node])
            nodes_of[p:q] = node
            if node in self.nodes:
                t = self.nodes.index(node)
                state -= int(self._used[q] - self._used[p]) * self._strides[t]
            q, node = p, int(came_from[p, state, node])
        return nodes_of
