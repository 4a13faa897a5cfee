"""Chooses how the ng-neighbourhoods grow (dynamic ng-route relaxation, Roberti & Mingozzi 2014).

A few cycles are excluded at a time, and fewer if pricing needs too many labels.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

from resplit.planner.bound.ng_paths import Cycle, Neighbourhoods

__all__ = ["NeighbourhoodGrowth"]

MIN_BATCH = 3  # cycles excluded at once, if that is more than a quarter of the nodes
FIRST_LABELS, MAX_LABELS = 400_000, 1_600_000  # of one pricing; these take about 0.3 and 1 s


@dataclass
class NeighbourhoodGrowth:
    """`neighbourhoods` are those in use; `affordable` the largest for which pricing stayed below the label limit."""

    neighbourhoods: Neighbourhoods
    max_labels: int = FIRST_LABELS
    affordable: Neighbourhoods = field(init=False)
    _pending: list[Cycle] = field(default_factory=list)
    _batch: int = field(init=False)
    _exact_tried: bool = False  # whether exact node states were tried
    _too_expensive: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.affordable = self.neighbourhoods
        self._batch = self._usual_batch = max(MIN_BATCH, len(self.neighbourhoods.contains) // 4)

    def restarted(self) -> NeighbourhoodGrowth:
        """A copy for a subproblem, which tries the cycles again that were too expensive before."""
        new = copy(self)
        new._pending, new._too_expensive = list(self._pending), set()
        return new

    def extend(self, cycles: list[Cycle], few_labels: bool) -> bool:
        """Exclude the cycles of the largest gain in the last solution, more of them if pricing took `few_labels`.

        Returns False if no growth is left.
        """
        self.affordable = self.neighbourhoods
        self._pending = [cycle for cycle in cycles if (cycle.node, cycle.between) not in self._too_expensive]
        self._batch = self._usual_batch if few_labels else min(self._batch, MIN_BATCH)
        return self._next()

    def reduce(self) -> bool:
        """After too many labels, exclude fewer of the same cycles, or others. Returns False if no growth is left."""
        if self._batch > 1 and len(self._pending) > 1:
            self._batch = max(1, min(self._batch, len(self._pending)) // 3)
        elif self._pending:
            tried = self._pending.pop(0)
            self._too_expensive.add((tried.node, tried.between))
        return self._next()

    def _next(self) -> bool:
        while self._pending:
            neighbourhoods = self.affordable.extended(self._pending[: self._batch])
            if neighbourhoods.fits_labels:
                self.neighbourhoods = neighbourhoods
                return True
            self._pending.pop()
        if self.affordable.coarse and not self._too_expensive and not self._exact_tried:
            self.neighbourhoods, self._exact_tried = Neighbourhoods(self.affordable.contains, coarse=False), True
            return True
        return self._raise_label_limit()

    def _raise_label_limit(self) -> bool:
        """Allow more labels once nothing is left to try within the present limit."""
        if not self._too_expensive or self.max_labels >= MAX_LABELS:
            return False
        self.max_labels = MAX_LABELS
        self._too_expensive.clear()
        self.neighbourhoods = self.affordable
        return True
