"""Whether a new plan could be worth more than the last one: cheap to answer, so that ticks need not plan.

Detected changes are news in any case; this compares what a tick sees with what the last plan saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resplit.decide.decision import Decision
from resplit.decide.price import price_current
from resplit.decide.state import History, Measured, Settings
from resplit.planner.mean_request import block_seconds, link_seconds
from resplit.types import FloatArray, Problem

__all__ = ["LastPlan", "has_news", "nearly_same"]

_TIMES, _LINKS, _RATES = 0.1, 0.3, 0.25  # relative changes that may be noise
_BACKGROUND = 0.1  # of the node


@dataclass(frozen=True)
class LastPlan:
    """When was planned last, for which problem, what that problem's placement cost, and what was decided."""

    at_s: float
    problem: Problem
    decision: Decision

    @property
    def is_final(self) -> bool:
        """Whether nothing was left to be gained: no plan that only the cooldown or a bar held back."""
        kept = self.decision.chosen
        if self.decision.action != "keep" or kept is None:
            return False
        worth = self.decision.threshold * kept.objective
        return all(
            each.placement is None or each.net_gain <= 0 or each.gain_per_request <= worth
            for each in self.decision.alternatives
        )


def has_news(
    last: LastPlan, problem: Problem, now_s: float, settings: Settings, history: History, measured: Measured | None
) -> bool:
    """Whether `problem` should be planned for, after the plan `last`.

    It should if that plan left something to gain, is older than the horizon, or was made for another placement; while a
    move is on trial or requests miss their objective; and if the placement's cost, a node, a link or the demand is not
    what it was, by more than noise.
    """
    if not last.is_final or now_s >= last.at_s + settings.horizon_s or problem.current != last.problem.current:
        return True
    if (history.last and now_s <= history.last.at_s + settings.trial_s) or (measured and measured.slo_missed):
        return True
    least_s = settings.threshold * last.decision.chosen.latency_s / 2 if last.decision.chosen else 0.0
    return not nearly_same(last.problem, problem, least_s) or _costs_more(last, problem, settings)


def _costs_more(last: LastPlan, problem: Problem, settings: Settings) -> bool:
    assert last.decision.chosen is not None
    current = price_current(problem, settings)
    before, threshold = last.decision.chosen.objective, settings.threshold + last.decision.uncertainty
    return bool(current.broken or current.exceeded) or current.keep.objective > (1 + threshold) * before


def nearly_same(before: Problem, problem: Problem, least_s: float) -> bool:
    """Whether two problems have the same nodes and nearly the same values.

    `least_s` are the seconds of a request that a link has to gain or lose. A node is reached by one link and left by
    another, so a change that matters is shared by two.
    """
    if [node.name for node in before.nodes] != [node.name for node in problem.nodes]:
        return False
    background = [np.array([node.background_utilization for node in each.nodes]) for each in (before, problem)]
    rates_before, rates = (np.array([each.rate_rps for each in posed.classes]) for posed in (before, problem))
    return (
        bool((np.abs(background[1] - background[0]) <= _BACKGROUND).all())
        and _near(rates_before, rates, _RATES)
        and _near(block_seconds(before), block_seconds(problem), _TIMES)
        and _near(link_seconds(before), link_seconds(problem), _LINKS, least_s)
    )


def _near(before: FloatArray, now: FloatArray, share: float, least: float = 0.0) -> bool:
    """Whether all values differ by at most a share of what they were, or by at most `least`."""
    if before.shape != now.shape or (np.isnan(before) != np.isnan(now)).any():
        return False
    return not (np.abs(now - before) > np.maximum(share * np.abs(before), least)).any()
