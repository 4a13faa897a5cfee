"""Simulated annealing in runs, each twice as long as the one before.

It sets temperatures and lengths; `moves` makes and evaluates the moves.
"""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.search.kernel_arrays import KernelArrays
from resplit.planner.search.moves import walk

__all__ = ["Annealing"]

CHUNK = 8_000  # moves between two readings of the budget, 2 to 5 ms
MIN_CHUNKS, CHUNKS_PER_ROOT = 5, 0.6  # of the first run; its length grows with the square root of atoms x nodes
# Temperatures as shares of the best known objective: the start of the first run, of later runs, and the end of all.
HOT, WARM, COLD = 0.1, 0.03, 1e-3
UNKNOWN = 5.0  # stands for the best objective, in units of `scale`, if no legal placement is known


class Annealing:
    """Annealing runs on one instance. `scale` is a typical objective; `seed` fixes the random moves."""

    def __init__(self, instance: Instance, scale: float, seed: int = 0) -> None:
        self._arrays = KernelArrays.of(instance)
        self._scale = abs(scale) or 1.0
        # One mean atom above a memory limit, a third of a node above a ceiling, and a missing link each cost `scale`.
        self._penalty = self._scale * np.array([1 / max(float(instance.memory.mean()), 1e-300), 3.0, 1.0])
        self._random = np.random.default_rng(seed).integers(1, 2**63, 1, dtype=np.uint64)
        self._hot = HOT
        self._chunks = max(MIN_CHUNKS, round(CHUNKS_PER_ROOT * instance.load.size**0.5))

    def run(self, start: IntArray, cost: float, budget: Budget) -> tuple[IntArray, IntArray | None]:
        """Anneal once from `start` (A,), which may violate limits and lack links.

        `cost` is the best known objective, or inf. The run is twice as long as the last one, or shorter if the budget
        ends. Returns the last placement (A,), and the best legal one (A,) or None.
        """
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
