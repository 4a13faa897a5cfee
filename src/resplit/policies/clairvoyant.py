"""The policy `clairvoyant`: knows the scenario, and has the best plan of each phase live when the phase begins."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from resplit.decide import Decision
from resplit.policies.base import Occasion, Situation, best_placement, move

__all__ = ["Clairvoyant"]


class Clairvoyant:
    """Takes the best plan of each phase, whatever the move costs: a limit for policies that cannot know it."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"schedule"})

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """The best plan for the problem as it is in this phase."""
        return move(situation, best_placement(situation), "the best plan of this phase was known beforehand")
