"""A policy of one's own, in twenty lines: move to the best plan when others take more than half of a node in use.

resplit simulate data/scenarios/home-day.yaml --policy examples.own_policy:LeaveBusyNodes
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from resplit.decide import Decision
from resplit.policies.base import Occasion, Situation, best_placement, keep, move


class LeaveBusyNodes:
    """Asked at each tick and at each detected change; it sees what `Situation` says, and nothing else."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick", "change"})

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """The best plan if a node that holds blocks is taken by others; keep otherwise."""
        used = set(situation.problem.current or ())
        taken = [n.name for n in situation.problem.nodes if n.name in used and n.background_utilization > 0.5]
        if not taken:
            return keep(situation, "no node in use is taken by others")
        return move(situation, best_placement(situation), f"others use {', '.join(taken)}")
