"""Preparing for likely changes in simulated time, by the rules of `control/ready_plans.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resplit.control.ready_plans import REST, ReadyPlans, plan_ahead
from resplit.control.rules import PlacementRules
from resplit.decide import Ready
from resplit.decide.likely import LikelyChange
from resplit.simulate.agenda import Agenda
from resplit.simulate.deployment import SimulatedDeployment
from resplit.types import Problem

__all__ = ["SimulatedReadiness"]


class SimulatedReadiness:
    """Keeps one cluster ready while it `is_idle`. `pose` gives the present problem, which takes long for many links.

    A plan takes `plan_s`; it has `work_limit` steps.
    """

    def __init__(
        self,
        rules: PlacementRules,
        deployment: SimulatedDeployment,
        agenda: Agenda,
        is_idle: Callable[[], bool],
        pose: Callable[[], Problem],
        plan_s: float,
        work_limit: int | None,
    ) -> None:
        self._rules = rules
        self._deployment = deployment
        self._agenda = agenda
        self._is_idle = is_idle
        self._pose = pose
        self._plan_s = plan_s
        self._work_limit = work_limit
        self._plans = ReadyPlans()
        self._planning = False

    def look(self) -> None:
        """Check whether new plans are needed: the live epoch or the state of the cluster may have changed."""
        live, now_s = self._deployment.live, self._agenda.now_s
        if self._planning or live is None or not self._is_idle():
            return
        if self._plans.are_due(live.epoch, now_s):
            self._plans.begin(live.epoch, self._pose(), self._previous(), now_s)
        if self._plans.left:
            self._planning = True
            change = self._plans.left.pop(0)
            placement = plan_ahead(change.problem, self._plan_s, self._work_limit)
            self._agenda.after(self._plan_s, self._planned, change, placement)

    def ready(self) -> Ready:
        """What is ready for a move away from the live epoch."""
        return self._plans.ready(self._live_number, self._rules, self._deployment.ready())

    def after_loss(self, lost: Sequence[str]) -> tuple[str, ...] | None:
        """The placement that was planned for the loss of this node in the live epoch; None if there is none."""
        return self._plans.after_loss(self._live_number, lost, self._rules)

    def _planned(self, change: LikelyChange, placement: tuple[str, ...] | None) -> None:
        self._plans.note(change, placement)
        if (live := self._deployment.live) is not None:
            nodes = self._rules.cluster.node_names
            wanted = {node: self._plans.wanted(node, live.epoch, live.placement, self._rules) for node in nodes}
            self._deployment.keep_ready(wanted)
        self._agenda.after(REST * self._plan_s, self._rested)

    def _rested(self) -> None:
        self._planning = False
        self.look()

    @property
    def _live_number(self) -> int:
        return self._deployment.live.epoch if self._deployment.live else 0

    def _previous(self) -> tuple[str, ...] | None:
        history = self._deployment.history
        return history[-2].placement if len(history) > 1 else None
