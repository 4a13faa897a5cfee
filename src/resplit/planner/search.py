"""Local search: descents over interval moves and orders of nodes in turn, and restarts. Knows nothing of bounds."""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.improve import Descent
from resplit.planner.instance import Instance, IntArray
from resplit.planner.paths import IntervalPaths
from resplit.planner.sequences import SequenceDescent

__all__ = ["LocalSearch"]


class LocalSearch:
    """Keeps the best legal placement that it has met; `scale` is a typical objective, for the penalties."""

    def __init__(self, instance: Instance, paths: IntervalPaths, scale: float) -> None:
        self.instance = instance
        self.best: IntArray | None = None
        self.cost = float("inf")
        self.nearest: IntArray | None = None  # of the placements that break limits, the one that breaks them least
        self._least_excess = float("inf")
        self.met: dict[bytes, tuple[float, IntArray]] = {}  # legal local optima by what they are
        self._moves = Descent(instance, 3 * abs(scale) or 1.0)
        self._orders = SequenceDescent(instance, paths)
        self._starts: set[bytes] = set()
        self._random = np.random.default_rng(0)

    def offer(self, nodes_of: IntArray) -> None:
        """Takes note of a placement if it is legal."""
        cost = self.instance.cost(nodes_of)
        if cost < float("inf"):
            self.met[nodes_of.tobytes()] = cost, nodes_of
        elif (excess := self.instance.excess(nodes_of)) < self._least_excess:
            self.nearest, self._least_excess = nodes_of, excess
        if cost < self.cost:
            self.best, self.cost = nodes_of, cost

    def run(self, start: IntArray, budget: Budget) -> None:
        """Descends from `start`; every atom must be where it can run, any other limit may be broken."""
        if start.tobytes() in self._starts:
            return
        self._starts.add(start.tobytes())
        nodes_of = self._moves.descend(start, budget)
        cost = self.instance.cost(nodes_of)
        while not budget.spent:
            nodes_of = self._moves.descend(self._orders.descend(nodes_of, budget), budget)
            before, cost = cost, self.instance.cost(nodes_of)
            if not cost < before * (1 - 1e-9):
                break
        self.offer(nodes_of)

    def restart(self, budget: Budget) -> None:
        """Descends from a random change of the best placement: of its order of nodes, or of a few intervals."""
        if self.best is None:
            return
        shaken = self._orders.shaken(self.best, self._random) if self._random.random() < 0.7 else None
        self.run(shaken if shaken is not None else self._scattered(self.best), budget)

    def _scattered(self, nodes_of: IntArray) -> IntArray:
        """`nodes_of` with up to three random intervals on random nodes that can run them."""
        scattered = nodes_of.copy()
        atoms = self.instance.shape[0]
        blocked = self.instance.blocked_prefix
        for _ in range(int(self._random.integers(1, 4))):
            p = int(self._random.integers(atoms))
            q = min(atoms, p + 1 + int(self._random.integers(max(2, atoms // 4))))
            runs = np.flatnonzero((blocked[q] == blocked[p]) & (self.instance.headroom > 0))
            if len(runs):
                scattered[p:q] = self._random.choice(runs)
        return scattered
