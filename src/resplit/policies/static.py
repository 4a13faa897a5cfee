"""The policy `static`: the first placement, kept."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from resplit.decide import Decision
from resplit.policies.base import Occasion, Situation, keep

__all__ = ["Static"]


class Static:
    """Keeps the first placement, and is never asked."""

    asked: ClassVar[frozenset[Occasion]] = frozenset()

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """Keep."""
        return keep(situation, "the first placement is kept")
