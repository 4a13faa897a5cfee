"""The baseline `uniform`: equal numbers of blocks on all nodes, in the order of the problem."""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """Split the chain evenly. All limits are ignored."""
    atoms, nodes = instance.shape
    return Outcome(np.arange(atoms) * min(nodes, atoms) // atoms, -np.inf)
