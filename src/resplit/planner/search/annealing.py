"""Simulated annealing: runs of random moves that cool down, each twice as long as the one before.

Knows nothing of bounds, nor how a move is made and priced (see `moves`).
"""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.search.kernel_arrays import KernelArrays
from resplit.planner.search.moves import walk

__all__ = ["Annealing"]

CHUNK = 8_000  # moves between two looks at the budget, 2 to 5 ms
MIN_CHUNKS, CHUNKS_PER_ROOT = 5, 0.6  # of the first run, which grows with the root of atoms x nodes
# Temperatures, of the best objective known: where the first run begins, where later ones do, where all end.
HOT, WARM, COLD = 0.1, 0.03, 1e-3
UNKNOWN = 5.0  # the best objective, of its scale, where no legal placement is known


class Annealing:
    """Runs over the placements of one instance; `scale` is a typical objective."""

    def __init__(self, instance: Instance, scale: float, seed: int = 0) -> None:
        self._arrays = KernelArrays.of(instance)
        self._scale = abs(scale) or 1.0
        # a mean atom too much, a third of a node too busy, or a missing link costs about as much as everything else
        self._penalty = self._scale * np.array([1 / max(float(instance.memory.mean()), 1e-300), 3.0, 1.0])
        self._random = np.random.default_rng(seed).integers(1, 2**63, 1, dtype=np.uint64)
        self._hot = HOT
        self._chunks = max(MIN_CHUNKS, round(CHUNKS_PER_ROOT * instance.load.size**0.5))

    def run(self, start: IntArray, cost: float, budget: Budget) -> tuple[IntArray, IntArray | None]:
        """Cools down from `start` (A,), which may break limits and have missing links; `cost` is the best objective
        known, inf where none is. It is as long as the budget lets it be, at most twice the last run. Returns where it
        ended, and the best legal placement that it met, None where it met none."""
        chunks, self._chunks = self._chunks, 2 * self._chunks
        here = start.astype(np.int64)
        best = here.copy()
        best_cost, penalty = float("inf"), self._penalty.copy()
        typical = cost if cost < float("inf") else UNKNOWN * self._scale
        hot, cold, self._hot = self._hot * typical, COLD * typical, WARM
        ran, spent_before = 0, budget.share_spent
        progress = 0.0
        while progress < 1 and budget.spend():
            ran += 1
            of_budget = (budget.share_spent - spent_before) / max(1 - spent_before, 1e-9)
            before, progress = progress, min(1.0, max(ran / chunks, of_budget))
            best_cost = walk(
                here, best, best_cost, self._arrays, penalty, self._penalty, hot * (cold / hot) ** before,
                hot * (cold / hot) ** progress, CHUNK, self._random,
            )  # fmt: skip
        return here.astype(np.intp), best.astype(np.intp) if best_cost < float("inf") else None
