"""Local search: annealing, and descents over interval moves from what it finds. Knows nothing of bounds."""

from __future__ import annotations

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.search.annealing import Annealing
from resplit.planner.search.descent import Descent

__all__ = ["LocalSearch"]


class LocalSearch:
    """Keeps the best legal placement that it has met; `scale` is a typical objective, for the penalties."""

    def __init__(self, instance: Instance, scale: float) -> None:
        self.instance = instance
        self.best: IntArray | None = None
        self.cost = float("inf")
        self.nearest: IntArray | None = None  # of the placements that break limits, the one that breaks them least
        self._least_excess = float("inf")
        self.met: dict[bytes, tuple[float, IntArray]] = {}  # legal local optima by what they are
        self._moves = Descent(instance, 3 * abs(scale) or 1.0)
        self._annealing = Annealing(instance, scale)
        self._starts: set[bytes] = set()

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
        self.offer(self._moves.descend(start, budget))

    def anneal(self, start: IntArray, budget: Budget) -> None:
        """Cools down from the best placement known, or from `start` where none is; each time for twice as long."""
        ended, found = self._annealing.run(start if self.best is None else self.best, self.cost, budget)
        self.offer(ended)
        if found is not None:
            self.offer(found)
            self.run(found, budget)
