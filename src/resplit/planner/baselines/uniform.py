"""`uniform`: equal numbers of blocks on every node, in the order in which the nodes are listed."""

from __future__ import annotations

import numpy as np

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance, IntArray
from resplit.planner.outcome import Outcome

__all__ = ["solve"]


def solve(instance: Instance, budget: Budget, start: IntArray | None = None) -> Outcome:
    """The even split; every limit is left to chance."""
    atoms, nodes = instance.shape
    return Outcome(np.arange(atoms) * min(nodes, atoms) // atoms, -np.inf)
