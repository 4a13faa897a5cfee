"""The policy `resplit`: the adaptive orchestrator of `decide`, at each tick and at each detected change."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from resplit.decide import Decision, decide
from resplit.policies.base import Occasion, Situation

__all__ = ["Orchestrator"]


class Orchestrator:
    """Prices keep, redistribute, re-split and rollback (equations 8 and 9), and takes the best net gain."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick", "change"})

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """`resplit.decide.decide`. DataError if nothing is placed yet."""
        return decide(
            situation.problem,
            now_s=situation.now_s,
            settings=situation.settings,
            history=situation.history,
            uncertainty=situation.uncertainty,
            measured=situation.measured,
            ready=situation.ready,
        )
