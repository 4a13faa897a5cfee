"""The plans that are made ahead for likely changes of the live epoch, and what nodes should keep ready for them.

Values and a clock are handed in: a cluster and the simulator prepare by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from resplit.control.rules import PlacementRules
from resplit.decide import Ready
from resplit.decide.likely import LikelyChange, likely_changes
from resplit.decide.news import nearly_same
from resplit.planner.evaluate import evaluate
from resplit.planner.shortlist import solve_shortlisted
from resplit.types import Problem

__all__ = ["REST", "ReadyPlans", "plan_ahead"]

REST = 1.0  # a plan takes so many times its own time until the next one begins: planning ahead is not urgent
_KEPT_FOR_S = 30.0  # then they are made again, because the state of the cluster drifts
_TOLERANCE = 0.01
_LEAST_SHARE = 0.025  # of a request's time, that a link has to gain or lose to be news
_Placement = tuple[str, ...]


class ReadyPlans:
    """The plans for one live epoch, by the change in words, and the changes that are `left` to be planned for."""

    def __init__(self) -> None:
        self.left: list[LikelyChange] = []
        self._problem: Problem | None = None  # for which plans were begun last
        self._epoch = 0
        self._begun_s = -math.inf
        self._placements: dict[str, _Placement] = {}
        self._lost: dict[str, _Placement] = {}  # by the node that is lost

    @property
    def changes(self) -> tuple[str, ...]:
        """What is planned for, in words."""
        return tuple(self._placements)

    def are_due(self, epoch: int, now_s: float) -> bool:
        """Whether plans have to be made anew: they are too old, or for an epoch that is no longer live."""
        return epoch != self._epoch or now_s >= self._begun_s + _KEPT_FOR_S

    def begin(self, epoch: int, problem: Problem, previous: _Placement | None, now_s: float) -> None:
        """Begin anew, for `epoch` in the state `problem`; `previous` was live before it.

        The plans of the same epoch are kept until others replace them. They still hold if the state is nearly the same.
        """
        if epoch != self._epoch:
            self._placements = {"the way back": previous} if previous else {}
            self._lost = {}
        if epoch != self._epoch or self._problem is None or not _holds(self._problem, problem):
            self._problem, self.left = problem, likely_changes(problem)
        self._epoch, self._begun_s = epoch, now_s

    def note(self, change: LikelyChange, placement: _Placement | None) -> None:
        """The plan for a change was made. Without a plan, or if it keeps the live placement, there is nothing to do."""
        if placement is not None and placement != change.problem.current:
            self._placements[change.words] = placement
            if change.lost:
                self._lost[change.lost] = placement

    def allowed(self, epoch: int, rules: PlacementRules) -> list[_Placement]:
        """The placements that are ready while `epoch` is live and keep the rules."""
        if epoch != self._epoch:
            return []
        return [each for each in self._placements.values() if not rules.violation(each)]

    def ready(self, epoch: int, rules: PlacementRules, standby: Mapping[str, Sequence[int]]) -> Ready:
        """What is ready for a move away from `epoch`, if these blocks stand by, by node."""
        loaded = frozenset((block, node) for node, blocks in standby.items() for block in blocks)
        return Ready(tuple(dict.fromkeys(self.allowed(epoch, rules))), loaded)

    def after_loss(self, epoch: int, lost: Sequence[str], rules: PlacementRules) -> _Placement | None:
        """The placement that was planned for the loss of this node in the live epoch; None if there is none."""
        placement = self._lost.get(lost[0]) if len(lost) == 1 else None
        return placement if placement in self.allowed(epoch, rules) else None

    def wanted(self, node: str, epoch: int, live: _Placement, rules: PlacementRules) -> tuple[int, ...]:
        """The blocks that a node should keep ready, the most wanted first: those that it hosts, then those of plans."""
        if node in rules.drained:
            return ()
        placements = (live, *self.allowed(epoch, rules))
        blocks = dict.fromkeys(block for each in placements for block, host in enumerate(each) if host == node)
        trusted = node in rules.cluster.trusted
        return tuple(block for block in blocks if trusted or block not in rules.private)


def _holds(before: Problem, problem: Problem) -> bool:
    assert problem.current is not None
    latency_s = evaluate(problem, problem.current).terms.latency_s
    return math.isfinite(latency_s) and nearly_same(before, problem, _LEAST_SHARE * latency_s)


def plan_ahead(problem: Problem, time_limit_s: float, work_limit: int | None = None) -> _Placement | None:
    """The best placement that was found within a limit; None if there is none that keeps all constraints."""
    plan = solve_shortlisted(problem, time_limit_s=time_limit_s, work_limit=work_limit, tolerance=_TOLERANCE)
    legal = plan.placement is not None and not evaluate(problem, plan.placement).violations
    return plan.placement if legal else None
