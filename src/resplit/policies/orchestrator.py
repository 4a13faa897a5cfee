"""The policy `resplit`: the adaptive orchestrator of `decide`, at each detected change, and at ticks with news."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from resplit.decide import Decision, LastPlan, decide, has_news
from resplit.planner.shortlist import solve_shortlisted
from resplit.policies.base import Occasion, Situation, keep

__all__ = ["Orchestrator"]


class Orchestrator:
    """Prices keep, redistribute, re-split and rollback (equations 8 and 9), and takes the best net gain.

    It decides on what is expected over the horizon. A tick that expects what the last plan did keeps without a plan.
    """

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick", "change"})

    def __init__(self) -> None:
        self._last: LastPlan | None = None

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """`resplit.decide.decide`. DataError if nothing is placed yet."""
        problem, now_s = situation.ahead or situation.problem, situation.now_s
        settings, history, measured = situation.settings, situation.history, situation.measured
        last = self._last if not situation.changes else None
        if last is not None and not has_news(last, problem, now_s, settings, history, measured):
            return keep(situation, "nothing has changed since the last plan")
        decision = decide(
            problem,
            now_s=now_s,
            settings=settings,
            history=history,
            uncertainty=situation.uncertainty,
            measured=measured,
            ready=situation.ready,
            solve=solve_shortlisted,
        )
        self._last = LastPlan(now_s, problem, decision)
        return decision
