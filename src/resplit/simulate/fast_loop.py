"""The fast loop in simulated time: follows every pass and report, and decides when a change is detected.

It decides as `control/fast_loop.py` does. What a plan takes is a given time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from resplit.control.fast_loop import MOST_PLANS, concern_links
from resplit.control.repeated_measurements import SETTLE_S
from resplit.control.rules import PlacementRules
from resplit.decide import Decision, Ready, for_a_change
from resplit.decide.state import NOTHING_READY, Placement
from resplit.estimate import Change, ahead, both_ways
from resplit.pass_times import PassTime
from resplit.policies import Situation
from resplit.simulate.agenda import Agenda
from resplit.simulate.decisions import SimulatedDecisions
from resplit.simulate.deployment import SimulatedDeployment
from resplit.simulate.loop import Loop
from resplit.simulate.planning import SimulatedPlanner
from resplit.simulate.readiness import SimulatedReadiness
from resplit.simulate.remeasurement import SimulatedRemeasurement
from resplit.simulate.reports import Report, Reports

__all__ = ["SimulatedFastLoop"]

_BETWEEN_CHECKS_S = 0.02


class SimulatedFastLoop:
    """The fast loop of one cluster. It decides from the first tick on, if the policy `is_asked` about changes."""

    def __init__(
        self,
        is_asked: bool,
        rules: PlacementRules,
        loop: Loop,
        planner: SimulatedPlanner,
        decisions: SimulatedDecisions,
        deployment: SimulatedDeployment,
        reports: Reports,
        agenda: Agenda,
    ) -> None:
        self._is_asked = is_asked
        self._loop = loop
        self._planner = planner
        self._decisions = decisions
        self._deployment = deployment
        self._agenda = agenda
        self._remeasurement = SimulatedRemeasurement(reports, planner.estimate.links.doubted, agenda)
        self._readiness = self._prepared(rules) if loop.prepares and is_asked else None
        self._changes: list[Change] = []  # not seen by any decision yet
        self._refused: list[Change] = []  # decided on while another move was under way
        self._reacting = False
        self._armed = False
        self._stopped = False

    def _prepared(self, rules: PlacementRules) -> SimulatedReadiness:
        """What makes plans ahead and lets blocks stand by."""
        return SimulatedReadiness(
            rules,
            self._deployment,
            self._agenda,
            self._is_idle,
            self._planner.present_problem,
            self._loop.ahead_s,
            self._loop.settings.work_limit,
        )

    def arm(self) -> None:
        """Decide on changes from now on, if the policy is asked about them: a tick has set the models."""
        if not self._armed:  # what was detected before is no news to the models
            self._changes.clear()
        self._armed = self._is_asked

    def stop(self) -> None:
        """Stop deciding."""
        self._stopped = True

    # --- what is seen

    def passed(self, done: PassTime) -> None:
        """Take the times of a pass; ignore passes during which blocks were loaded."""
        if done.at_s - done.total_s <= self._decisions.disturbed_until_s:
            return
        self._note(self._planner.estimate.observe(done))
        self._look_into(self._planner.estimate.suspects(done))

    def reported(self, report: Report) -> None:
        """Take the report of a node: about itself, and its probes of links."""
        now_s, estimate, node = self._agenda.now_s, self._planner.estimate, report.node
        if not math.isnan(report.reference_s):
            self._note(estimate.observe_report(node, report.reference_s, report.background_utilization, now_s))
            if estimate.doubts(node):
                self._remeasurement.of_node(node)
        for echo in report.links:
            self._note(estimate.links.observe(node, echo.peer, echo.size_bytes, echo.seconds, echo.at_s))
        self._look_into(estimate.links.doubted())

    def _look_into(self, links: Sequence[tuple[str, str]]) -> None:
        if links:  # hardly ever
            self._remeasurement.of_links(both_ways(links))

    def _note(self, changes: Sequence[Change]) -> None:
        if not changes:
            return
        self._changes += changes
        self._planner.fit_soon()
        self._react_soon()

    # --- decide on changes

    def _react_soon(self) -> None:
        if self._changes and not self._reacting and self._armed and not self._stopped:
            self._reacting = True
            self._agenda.after(0.0, self._react)

    def _react(self) -> None:
        """Ask about the changes that were detected, with the models that the last tick set."""
        changes, self._changes = self._changes, []
        if changes and self._planner.latest is not None and self._deployment.live is not None:
            self._ask_about(changes, self._agenda.now_s, 1)
        else:
            self._reacting = False

    def _ask_about(self, changes: list[Change], noticed_s: float, plans: int) -> None:
        live = self._deployment.live
        assert live is not None
        now_s, problem, ready = self._agenda.now_s, self._planner.present_problem(), self.ready()
        settings = for_a_change(self._loop.settings, self._deployment.history, now_s)
        situation = Situation(
            now_s,
            problem,
            settings,
            self._decisions.history,
            self._planner.cost.uncertainty,
            tuple(changes),
            ready=ready,
            ahead=ahead(problem, self._planner.estimates()),
        )
        decision = self._decisions.choose(situation)
        took_s = self._loop.ready_reaction_s if ready.placements else self._loop.reaction_s
        settles = decision is not None and decision.action != "keep" and concern_links(changes, problem)
        until_s = now_s + took_s + (SETTLE_S if settles else 0.0)
        self._agenda.after(took_s, self._planned, changes, decision, live.epoch, noticed_s, plans, until_s)

    def _planned(
        self,
        changes: list[Change],
        decision: Decision | None,
        based_on: int,
        noticed_s: float,
        plans: int,
        until_s: float,
    ) -> None:
        """The plan is made. It waits until no link is doubted any more, but not beyond `until_s`."""
        now_s = self._agenda.now_s
        if now_s < until_s and not self._changes and self._remeasurement.may_end_doubts:
            wait_s = min(_BETWEEN_CHECKS_S, until_s - now_s)
            self._agenda.after(wait_s, self._planned, changes, decision, based_on, noticed_s, plans, until_s)
        else:
            self._reacted(changes, decision, based_on, noticed_s, plans)

    def _reacted(
        self, changes: list[Change], decision: Decision | None, based_on: int, noticed_s: float, plans: int
    ) -> None:
        """As in the controller, a plan is made again if more changes were detected meanwhile."""
        if self._changes and plans < MOST_PLANS and not self._stopped:
            more, self._changes = self._changes, []
            self._ask_about(changes + more, noticed_s, plans + 1)
            return
        self._reacting = False
        if decision is not None:
            self._deploy(replace(decision, at_s=noticed_s), based_on, changes)
        self._react_soon()
        self.look_ahead()

    def _deploy(self, decision: Decision, based_on: int, changes: list[Change]) -> None:
        """Deploy a decision. If another move is under way, its `changes` are decided on again once that is live."""
        took_s = self._agenda.now_s - decision.at_s
        if decision.action == "keep":
            self._decisions.keep(decision, took_s)
            return
        slowed = {change.subject for change in changes if change.is_slower}
        if not self._decisions.deploy(decision, based_on, self._loop.settings, took_s, slowed):
            self._refused += changes

    def moved(self) -> None:
        """A move is live: plan ahead for it, and decide on the changes of decisions that were refused meanwhile."""
        self.look_ahead()
        self._changes[:0], self._refused = self._refused, []
        self._react_soon()

    # --- ready before it is needed

    def look_ahead(self) -> None:
        """Plan for likely changes, if no such plans are ready."""
        if self._readiness is not None and self._armed:
            self._readiness.look()

    def ready(self) -> Ready:
        """What is ready for a move away from the live epoch."""
        return NOTHING_READY if self._readiness is None else self._readiness.ready()

    def after_loss(self, lost: Sequence[str]) -> Placement | None:
        """The placement that was planned for this loss; None if there is none."""
        return None if self._readiness is None else self._readiness.after_loss(lost)

    def _is_idle(self) -> bool:
        """Whether there is a problem to prepare for, and nothing else is being decided."""
        idle = not self._reacting and not self._stopped and self._planner.latest is not None
        return idle and self._deployment.live is not None
