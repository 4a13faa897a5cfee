"""Steepest descent over interval moves, which put atoms p..q-1 on node k. All moves are evaluated at once.

A start may violate memory and load limits. A penalty on the excess leads back to legal placements.
"""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.types import FloatArray

__all__ = ["Descent"]


class Descent:
    """The interval moves of one instance. `penalty` is the price of violating a limit, in units of the objective."""

    def __init__(self, instance: Instance, penalty: float) -> None:
        self.instance = instance
        self.penalty = penalty
        inst = instance
        self._p, self._q = np.triu_indices(inst.shape[0] + 1, 1)  # moves of atoms p..q-1
        self._load = inst.load_prefix[self._q] - inst.load_prefix[self._p]  # (M, N)
        self._memory = inst.memory_prefix[self._q] - inst.memory_prefix[self._p]  # (M,)
        self._fixed = inst.fixed_prefix[self._q] - inst.fixed_prefix[self._p]  # (M, N)
        self._fixed[inst.blocked_prefix[self._q] > inst.blocked_prefix[self._p]] = np.inf
        self._top = np.clip(inst.headroom, 0, None)
        self._closed = inst.headroom < 0
        self._memory_unit = max(float(inst.memory.sum()), 1e-300)
        missing = 3 * penalty
        self._start, self._end = np.minimum(inst.start, missing), np.minimum(inst.end, missing)
        self._hops = [np.minimum(hop, missing) for hop in inst.hops]
        for hop in self._hops:
            np.fill_diagonal(hop, 0)

    def descend(self, nodes_of: IntArray, budget: Budget) -> IntArray:
        """Descend from `nodes_of` (A,) to a local optimum (A,), or until the budget is spent.

        At the start, each atom must be on a node that can run it; other limits may be violated.
        """
        while budget.spend():
            delta = self.deltas(nodes_of)  # (M, N)
            best = int(delta.argmin())
            move, node = divmod(best, delta.shape[1])
            if not delta[move, node] < -1e-9 * self.penalty:
                break
            nodes_of = self.apply_move(nodes_of, move, node)
        return nodes_of

    def apply_move(self, nodes_of: IntArray, move: int, node: int) -> IntArray:
        """`nodes_of` (A,) after the move with index `move` to `node`."""
        changed = nodes_of.copy()
        changed[self._p[move] : self._q[move]] = node
        return changed

    def deltas(self, nodes_of: IntArray) -> FloatArray:
        """Change of the penalised objective by each of M moves to each node (M, N)."""
        inst = self.instance
        used = np.unique(nodes_of)
        mine = nodes_of[:, None] == used  # (A, U)
        own_load = np.where(mine, inst.load[np.arange(len(nodes_of)), nodes_of][:, None], 0)
        own_memory = np.where(mine, inst.memory[:, None], 0)
        load = inst.loads(nodes_of)
        memory = np.bincount(nodes_of, inst.memory, inst.shape[1]).astype(float)
        less_load = load[used] - self.interval_sums(own_load)  # (M, U), the rest of the node's load
        less_memory = memory[used] - self.interval_sums(own_memory)
        now = self._node_cost(load, memory, slice(None))  # (N,)
        gain = self._node_cost(less_load, less_memory, used) - now[used]  # (M, U), <= 0
        new_load = load + self._load
        new_memory = memory + self._memory[:, None]
        new_load[:, used] += less_load - load[used]
        new_memory[:, used] += less_memory - memory[used]
        delta: FloatArray = self._node_cost(new_load, new_memory, slice(None)) - now + gain.sum(axis=1)[:, None]
        delta[:, used] -= gain
        delta += self._path_deltas(nodes_of)
        if inst.balance_weight > 0:
            stays = (inst.background[used] + less_load).max(axis=1)[:, None]
            idle = np.delete(inst.background, used).max(initial=0.0)
            peak = np.maximum(np.maximum(stays, idle), inst.background + new_load)
            delta += inst.balance_weight * (peak - (inst.background + load).max())
        return delta

    def interval_sums(self, per_atom: FloatArray) -> FloatArray:
        """Sums of `per_atom` (A, U) over the atoms p..q-1 of each move (M, U)."""
        prefix = np.vstack([np.zeros(per_atom.shape[1]), per_atom.cumsum(axis=0)])
        return np.asarray(prefix[self._q] - prefix[self._p])

    def _path_deltas(self, nodes_of: IntArray) -> FloatArray:
        """Change of the transfer and privacy cost by each move (M, N)."""
        inst = self.instance
        atoms = len(nodes_of)
        hop_at = [self._hops[inst.hop_of[b]] for b in range(1, atoms)]
        here = [hop[i, k] for hop, i, k in zip(hop_at, nodes_of[:-1], nodes_of[1:], strict=True)]
        boundary = np.array([self._start[nodes_of[0]], *here, self._end[nodes_of[-1]]])  # (A + 1,)
        boundary_prefix = np.concatenate(([0.0], boundary.cumsum()))
        left = np.vstack([self._start, *(hop[i] for hop, i in zip(hop_at, nodes_of[:-1], strict=True))])  # (A, N)
        right = np.vstack([*(hop[:, k] for hop, k in zip(hop_at, nodes_of[1:], strict=True)), self._end])  # (A, N)
        fixed = np.concatenate(([0.0], inst.fixed[np.arange(atoms), nodes_of].cumsum()))
        old = boundary_prefix[self._q + 1] - boundary_prefix[self._p] + fixed[self._q] - fixed[self._p]  # (M,)
        new = left[self._p] + right[self._q - 1] + self._fixed
        return np.asarray(new - old[:, None])

    def _node_cost(self, load: FloatArray, memory: FloatArray, node: IntArray | slice) -> FloatArray:
        """Queueing cost of nodes with these totals, with a penalty on the excess over their limits (..., nodes)."""
        inst = self.instance
        within = np.minimum(load, self._top[node])
        over_load = load - within
        over_memory = np.maximum(memory - inst.memory_limit[node], 0) / self._memory_unit
        broken = (over_load > 1e-12) | (over_memory > 0)
        excess = over_load + 10 * over_memory + 0.3 * broken + (self._closed[node] & (memory > 0))
        cost: FloatArray = inst.queue_weight[node] * within / ((1 - inst.background)[node] - within)
        return np.asarray(cost + self.penalty * excess)
