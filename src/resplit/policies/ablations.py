"""Policies that are `resplit` without one of its parts. The difference shows what the part is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from resplit.decide import Decision, History
from resplit.decide.state import NOTHING_READY
from resplit.policies.base import Occasion, Situation
from resplit.policies.orchestrator import Orchestrator
from resplit.types import Problem

__all__ = [
    "WithoutFastLoop",
    "WithoutForecast",
    "WithoutHysteresis",
    "WithoutKvTransfer",
    "WithoutQueueing",
    "WithoutStandby",
]

_NO_LOAD = 1e-6  # a problem must have a share above 0


class WithoutFastLoop(Orchestrator):
    """Asked at ticks only, not at detected changes."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick"})


class WithoutForecast(Orchestrator):
    """Decides on the present state: nothing is forecast, and the demand is that of the last seconds."""

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """As `resplit`, without what is expected."""
        return super().decide(replace(situation, ahead=None), rng)


class WithoutHysteresis(Orchestrator):
    """Any net gain above 0 is taken at once: no threshold, no cooldown, no trial and no bar."""

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """As `resplit`, with settings and a history that never prevent a move."""
        eager = replace(situation.settings, threshold=0.0, uncertainty_weight=0.0, cooldown_s=0.0, trial_s=0.0)
        return super().decide(replace(situation, settings=eager, history=History()), rng)


class WithoutKvTransfer(Orchestrator):
    """Decides as `resplit`. The simulator lets no caches follow a move under this name: they are computed again."""


class WithoutStandby(Orchestrator):
    """Begins each plan from nothing. The simulator lets nothing be planned ahead and no blocks stand by for it."""

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """As `resplit`, with nothing ready."""
        return super().decide(replace(situation, ready=NOTHING_READY), rng)


class WithoutQueueing(Orchestrator):
    """Plans and prices as if requests never waited for one another: the load counts for memory and moves only."""

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """As `resplit`, for a problem in which requests take no share of a node."""
        ahead = _without_load(situation.ahead) if situation.ahead else None
        return super().decide(replace(situation, problem=_without_load(situation.problem), ahead=ahead), rng)


def _without_load(problem: Problem) -> Problem:
    return replace(problem, nodes=tuple(replace(node, load_share=_NO_LOAD) for node in problem.nodes))
