"""Local search: annealing, followed by descents from the placements that it finds."""

from __future__ import annotations

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.search.annealing import Annealing
from resplit.planner.search.descent import Descent

__all__ = ["LocalSearch"]


class LocalSearch:
    """Keeps the best legal placement found; `scale` is a typical objective, which sets the penalties."""

    def __init__(self, instance: Instance, scale: float) -> None:
        self.instance = instance
        self.best: IntArray | None = None
        self.cost = float("inf")
        self.least_violating: IntArray | None = None  # the one with the least excess
        self._smallest_excess = float("inf")
        self.legal: dict[bytes, tuple[float, IntArray]] = {}  # legal placements by their bytes
        self._descent = Descent(instance, 3 * abs(scale) or 1.0)
        self._annealing = Annealing(instance, scale)
        self._descended_from: set[bytes] = set()

    def record(self, nodes_of: IntArray) -> None:
        """Record a placement (A,): as the best, as a legal one, or as the one that violates limits least."""
        cost = self.instance.cost(nodes_of)
        if cost < float("inf"):
            self.legal[nodes_of.tobytes()] = cost, nodes_of
        elif (excess := self.instance.excess(nodes_of)) < self._smallest_excess:
            self.least_violating, self._smallest_excess = nodes_of, excess
        if cost < self.cost:
            self.best, self.cost = nodes_of, cost

    def descend(self, start: IntArray, budget: Budget) -> None:
        """Descend from `start` (A,), at most once from each. Each atom must be on a node that can run it."""
        if start.tobytes() in self._descended_from:
            return
        self._descended_from.add(start.tobytes())
        self.record(self._descent.descend(start, budget))

    def anneal(self, start: IntArray, budget: Budget) -> None:
        """Anneal from the best placement known, or from `start` if there is none; each run is twice as long."""
        ended, found = self._annealing.run(start if self.best is None else self.best, self.cost, budget)
        self.record(ended)
        if found is not None:
            self.record(found)
            self.descend(found, budget)
