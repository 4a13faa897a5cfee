"""Descent over orders of nodes: every neighbouring order is priced with its best boundaries, by dynamic programming.

A placement is a sequence of nodes plus boundaries between them. Where each node stands once in the sequence the price
is exact; where one returns it pays each visit apart, so the true cost is checked before a step is taken. This finds
what interval moves cannot where memory is tight: several boundaries that must shift at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.paths import IntervalPaths
from resplit.types import FloatArray

__all__ = ["SequenceDescent"]

TRIED = 3  # of the neighbours that look cheapest, how many are priced truly
IMPROVEMENT = 1e-9  # relative


@dataclass(frozen=True)
class _Neighbours:
    """Orders (C) that keep the first `head[c]` and the last `S - tail[c]` nodes and have the first `length[c]` nodes of
    `middle[c]` between; the longest come first."""

    head: IntArray
    middle: IntArray
    length: IntArray
    tail: IntArray

    def order(self, c: int, base: list[int]) -> list[int]:
        """Neighbour number `c` of the order `base`."""
        middle = (int(i) for i in self.middle[c, : self.length[c]])
        return [*base[: self.head[c]], *middle, *base[self.tail[c] :]]


class SequenceDescent:
    """The neighbourhood of one instance."""

    def __init__(self, instance: Instance, paths: IntervalPaths) -> None:
        self.instance = instance
        atoms, nodes = instance.shape
        self._hop_of = np.concatenate((instance.hop_of, [0]))  # (A + 1,); boundaries 0 and A are not used
        self._hops = np.array(instance.hops)  # (kinds, N, N)
        longest = max((int((np.isfinite(queue).sum(axis=0)).max(initial=0)) for queue in paths.queue[1:]), default=0)
        self.longest = max(longest, 1)
        # steps[i, w, q]: cost of atoms q-w-1..q-1 on node i, its queueing and privacy
        self._steps = np.full((nodes, self.longest, atoms + 1), np.inf)
        for q in range(1, atoms + 1):
            whole = paths.queue[q] + instance.fixed_prefix[q] - instance.fixed_prefix[:q]  # (q, N)
            width = min(q, self.longest)
            self._steps[:, :width, q] = whole[::-1][:width].T

    def descend(self, nodes_of: IntArray, budget: Budget) -> IntArray:
        """The best placement that a chain of improving steps from `nodes_of` (A,) leads to."""
        best, cost = nodes_of, self.instance.cost(nodes_of)
        while budget.spend():
            improved = self._step(_order(best), cost)
            if improved is None:
                break
            best, cost = improved
        return best

    def _step(self, order: list[int], cost: float) -> tuple[IntArray, float] | None:
        """The cheapest of the most promising neighbours that is truly cheaper than `cost`."""
        near = _neighbours(order, self.instance.shape[1])
        value = self._price(order, near, self._forward(order), self._backward(order))
        for c in np.argsort(value, kind="stable")[:TRIED]:
            if not value[c] < cost * (1 - IMPROVEMENT):
                break
            nodes_of = self._boundaries(near.order(int(c), order))
            true_cost = self.instance.cost(nodes_of) if nodes_of is not None else np.inf
            if nodes_of is not None and true_cost < cost * (1 - IMPROVEMENT):
                return nodes_of, true_cost
        return None

    def shaken(self, nodes_of: IntArray, random: np.random.Generator) -> IntArray | None:
        """The best boundaries of an order that differs from that of `nodes_of` by a few random changes; None where it
        has none."""
        order = _order(nodes_of)
        for _ in range(int(random.integers(1, 4))):
            near = _neighbours(order, self.instance.shape[1])
            if len(near.head):
                order = near.order(int(random.integers(len(near.head))), order)
        return self._boundaries(order)

    def _enter(self, leave: FloatArray, before: IntArray, node: IntArray) -> FloatArray:
        """Costs (C, A + 1) at which `node` begins at each boundary, its predecessor having left it at cost `leave`;
        a predecessor -1 is the sources."""
        hop = self._hops[self._hop_of, before[:, None], node[:, None]]  # (C, A + 1)
        enter = leave + hop
        first = before < 0
        if first.any():
            enter[first] = np.inf
            enter[first, 0] = self.instance.start[node[first]]
        else:
            enter[:, 0] = np.inf
        return enter

    def _run(self, enter: FloatArray, node: IntArray) -> FloatArray:
        """Costs (C, A + 1) of leaving `node` at each boundary when it was entered at costs `enter`."""
        leave = np.full_like(enter, np.inf)
        for w in range(self.longest):
            longer = enter[:, : -w - 1] + self._steps[node, w, w + 1 :]
            np.minimum(leave[:, w + 1 :], longer, out=leave[:, w + 1 :])
        return leave

    def _forward(self, order: list[int]) -> FloatArray:
        leave = np.full((len(order) + 1, self.instance.shape[0] + 1), np.inf)
        before = -1
        for s, node in enumerate(order):
            enter = self._enter(leave[s : s + 1], np.array([before]), np.array([node]))
            leave[s + 1] = self._run(enter, np.array([node]))[0]
            before = node
        return leave

    def _backward(self, order: list[int]) -> FloatArray:
        """onward[s, p]: least cost of all that follows when node s of the order begins at boundary p (S + 1, A + 1)."""
        atoms = self.instance.shape[0]
        onward = np.full((len(order) + 1, atoms + 1), np.inf)
        width = self.longest
        ends = np.minimum(np.arange(atoms + 1)[:, None] + np.arange(1, width + 1), atoms)  # q of (p, w)
        beyond = np.arange(atoms + 1)[:, None] + np.arange(1, width + 1) > atoms
        for s in range(len(order) - 1, -1, -1):
            node = order[s]
            last = s == len(order) - 1
            onward_hop = 0.0 if last else self._hops[self._hop_of, node, order[s + 1]]
            ahead = onward[s + 1] + onward_hop
            ahead[atoms] = self.instance.end[node] if last else np.inf
            steps = self._steps[node][np.arange(width), ends]
            onward[s] = np.where(beyond, np.inf, steps + ahead[ends]).min(axis=1)
        return onward

    def _price(self, order: list[int], group: _Neighbours, heads: FloatArray, tails: FloatArray) -> FloatArray:
        """Cost (C,) of each neighbour with its best boundaries."""
        known = np.array([-1, *order])
        leave, before = heads[group.head], known[group.head]
        for column in range(group.middle.shape[1]):
            longer = slice(0, int((group.length > column).sum()))
            node = group.middle[longer, column]
            leave[longer] = self._run(self._enter(leave[longer], before[longer], node), node)
            before[longer] = node
        value = np.where(group.tail == len(order), leave[:, -1] + self.instance.end[before], np.inf)
        inner = np.flatnonzero(group.tail < len(order))
        if len(inner):
            after = np.array(order)[group.tail[inner]]
            enter = self._enter(leave[inner], before[inner], after)
            value[inner] = (enter + tails[group.tail[inner]]).min(axis=1)
        if self.instance.balance_weight > 0:
            value = value + self.instance.balance_weight * self.instance.background.max()
        return value

    def _boundaries(self, order: list[int]) -> IntArray | None:
        """The placement with the best boundaries for this order; None where there is none."""
        leaves = self._forward(order)
        atoms = self.instance.shape[0]
        nodes_of = np.empty(atoms, dtype=np.intp)
        q = atoms
        for s in range(len(order) - 1, -1, -1):
            node, before = order[s], order[s - 1] if s else -1
            enter = self._enter(leaves[s : s + 1], np.array([before]), np.array([node]))[0]
            width = min(q, self.longest)
            options = enter[q - width : q][::-1] + self._steps[node, :width, q]
            w = int(options.argmin()) if width else 0
            if not width or not np.isfinite(options[w]):
                return None
            nodes_of[q - w - 1 : q] = node
            q -= w + 1
        return nodes_of if q == 0 else None


def _order(nodes_of: IntArray) -> list[int]:
    changes = np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1
    return [int(i) for i in nodes_of[np.concatenate(([0], changes))]]


def _neighbours(order: list[int], nodes: int) -> _Neighbours:
    """Orders that differ by one node left out, replaced or put in, two swapped, one moved, or a run turned round."""
    count = len(order)
    unused = [i for i in range(nodes) if i not in set(order)]
    near: list[tuple[int, tuple[int, ...], int]] = []
    for s in range(count + 1):
        near += [(s, (i,), s) for i in unused]
    for s in range(count):
        near += [(s, (i,), s + 1) for i in unused]
        near += [(s, (), s + 1)] if count > 1 else []
        for t in range(s + 1, count):
            run = tuple(order[s : t + 1])
            changed = {(run[-1], *run[1:-1], run[0]), (*run[1:], run[0]), (run[-1], *run[:-1]), run[::-1]}
            near += [(s, middle, t + 1) for middle in sorted(changed)]
    near = [(head, middle, tail) for head, middle, tail in near if _alternates(order, head, middle, tail)]
    near.sort(key=lambda neighbour: -len(neighbour[1]))
    longest = max((len(middle) for _, middle, _ in near), default=0)
    return _Neighbours(
        np.array([head for head, _, _ in near], dtype=np.intp),
        np.array([(*middle, *([0] * (longest - len(middle)))) for _, middle, _ in near], np.intp).reshape(-1, longest),
        np.array([len(middle) for _, middle, _ in near], dtype=np.intp),
        np.array([tail for _, _, tail in near], dtype=np.intp),
    )


def _alternates(order: list[int], head: int, middle: tuple[int, ...], tail: int) -> bool:
    """True where no node follows itself at the seams (a moved run may bring equal nodes together)."""
    chain = [*order[head - 1 : head], *middle, *order[tail : tail + 1]] if head else [*middle, *order[tail : tail + 1]]
    return bool(chain) and all(a != b for a, b in pairwise(chain))
