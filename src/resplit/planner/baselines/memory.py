"""The baseline `memory`: blocks in proportion to memory, the largest node first (exo's ring partitioning)."""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Split the chain at the shares of total memory. Links, load and trust are ignored."""
    order = np.argsort(-instance.memory_limit, kind="stable")
    ends = instance.memory_limit[order].cumsum() / max(float(instance.memory_limit.sum()), 1e-300)
    atoms = instance.shape[0]
    middle = (np.arange(atoms) + 0.5) / atoms
    return Outcome(order[np.minimum(np.searchsorted(ends, middle), len(order) - 1)], -np.inf)
