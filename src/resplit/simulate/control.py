"""The control loops in simulated time: ticks, reactions to detected changes, and recovery from losses.

Cost model, estimate, planner and policies are those of a cluster. What they see is what a cluster would report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from resplit.config import ClusterConfig
from resplit.control.fast_loop import MOST_PLANS, concern_links
from resplit.control.planning import DEMAND_WINDOW_S, plan_without, planned_for, without
from resplit.control.repeated_measurements import SETTLE_S
from resplit.control.rules import PlacementRules
from resplit.cost import CostModel, NodeReading, fit_cost_model, node_readings, problem_from
from resplit.decide import (
    Decision,
    DecisionOutcome,
    History,
    Ready,
    Settings,
    measured_since,
    moved_often,
    registry_bytes_per_s,
)
from resplit.decide.state import NOTHING_READY
from resplit.epochs import RECOVER, LiveEpoch, Proposal
from resplit.errors import DataError, ProposalRefusedError, ResplitError
from resplit.estimate import Change, ClusterEstimate, Estimates, ahead, both_ways, speed_jumps, under_estimates
from resplit.pass_times import PassTime
from resplit.policies import Policy, Situation
from resplit.session_records import SessionRecord
from resplit.simulate.agenda import Agenda
from resplit.simulate.deployment import SimulatedDeployment
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.readiness import SimulatedReadiness
from resplit.simulate.remeasurement import SimulatedRemeasurement
from resplit.simulate.reports import Report, Reports
from resplit.simulate.sessions import SimulatedRoute
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures, Problem, RequestClass

__all__ = ["Control", "Loop"]

_BETWEEN_CHECKS_S = 0.02


@dataclass(frozen=True)
class Loop:
    """The loops: the period and window of ticks, how long planning takes, and how losses are noticed.

    A reaction takes `reaction_s`, or `ready_reaction_s` if its search starts from plans that were made ahead. Such a
    plan takes `ahead_s`; with `prepares` false, none is made, and no blocks stand by.

    The cost model is fitted again at the next tick after a detected change or a move, and else every `fit_s`. Between
    fits the estimate follows nodes and links.
    """

    settings: Settings = field(default_factory=lambda: Settings(work_limit=2000))
    period_s: float = 3.0
    window_s: float = 20.0
    fit_s: float = 10.0
    tick_s: float = 0.5
    reaction_s: float = 0.2
    ready_reaction_s: float = 0.1
    ahead_s: float = 0.3
    prepares: bool = True
    noticed_s: float = 0.55


class Control:
    """What decides in one simulated cluster. `decisions` is its log."""

    def __init__(
        self,
        cluster: ClusterConfig,
        features: Sequence[BlockFeatures],
        policy: Policy,
        loop: Loop,
        cost: CostModel,
        deployment: SimulatedDeployment,
        gateway: SimulatedGateway,
        reports: Reports | None,
        agenda: Agenda,
        rng: np.random.Generator,
    ) -> None:
        self.decisions: list[Decision] = []
        self._cluster = cluster
        self._features = features
        self._policy = policy
        self._loop = loop
        self._cost = cost
        self._deployment = deployment
        self._gateway = gateway
        self._reports = reports
        self._agenda = agenda
        self._rng = rng
        self._history = History()
        self._states = {node.name: NodeReading(node.memory, 0.0) for node in cluster.nodes}
        self._lost: set[str] = set()
        self._problem: Problem | None = None  # the latest that a tick posed
        self._changes: list[Change] = []
        self._refused: list[Change] = []  # decided on while another move was under way
        self._reacting = False
        self._armed = False
        self._stopped = False
        self._disturbed_until_s = -math.inf
        self._fit_due_s = -math.inf  # the next tick from then on fits
        self._estimate = ClusterEstimate(features, cluster.source)
        self._estimate.set_model(cost)
        doubted = self._estimate.links.doubted
        self._remeasurement = SimulatedRemeasurement(reports, doubted, agenda) if reports is not None else None
        self._slo_s = {declared.name: declared.slo for declared in cluster.classes}
        self._readiness = self._prepared() if loop.prepares and "change" in policy.asked else None

    def _prepared(self) -> SimulatedReadiness:
        """What makes plans ahead and lets blocks stand by."""
        rules, loop = PlacementRules(self._cluster, tuple(self._features)), self._loop
        return SimulatedReadiness(
            rules,
            self._deployment,
            self._agenda,
            self._is_idle,
            self._present_problem,
            loop.ahead_s,
            loop.settings.work_limit,
        )

    def start(self) -> None:
        """Begin the loops that the policy wants."""
        if self._policy.asked & {"tick", "change"}:
            self._gateway.on_pass = self._passed
            self._agenda.after(self._loop.period_s, self._tick)
            if self._reports is not None:
                self._reports.on_report = self._reported

    def first_problem(self) -> Problem:
        """The problem of the declared demand, before anything is placed."""
        self._problem = self._posed(self._gateway.journal.demand(1.0))
        return self._problem

    def stop(self) -> None:
        """Stop deciding: the workload has ended."""
        self._stopped = True

    def scheduled(self, problem: Problem) -> None:
        """A phase of the scenario begins, described by `problem`: ask a policy that knows the scenario."""
        live = self._deployment.live
        if "schedule" in self._policy.asked and live is not None and not self._stopped:
            posed = replace(problem, current=live.placement)
            situation = Situation(self._agenda.now_s, posed, self._loop.settings, self._history)
            self._ask(situation, self._loop.settings, 0.0)

    def lost(self, node: str) -> None:
        """A node went down. The cluster notices that a little later, and then plans without it."""
        self._agenda.after(self._loop.noticed_s, self._notice, node)

    def returned(self, node: str) -> None:
        """A node is back."""
        self._lost.discard(node)
        live = self._deployment.live
        if live is not None and self._gateway.broken:
            self._recover()
        self._look_ahead()

    # --- the slow loop

    def _tick(self) -> None:
        """Algorithm 1 of the paper: observe, fit, decide, propose."""
        if self._stopped:
            return
        self._agenda.after(self._loop.period_s, self._tick)
        now_s, window_s, live = self._agenda.now_s, self._loop.window_s, self._deployment.live
        if self._reports is None or live is None:
            return
        if now_s >= self._fit_due_s:
            try:
                self._fit(self._reports.window(now_s - window_s))
            except DataError as error:
                self.decisions.append(Decision(now_s, "keep", str(error)))
                return
        nodes = self._reports.node_table(now_s - window_s)
        self._states = node_readings(nodes)
        self._problem = self._posed(self._gateway.journal.demand(2 * window_s))
        estimates = self._estimates()
        problem = under_estimates(self._problem, estimates)
        moved_s = self._history.last.at_s if self._history.last else 0.0
        measured = measured_since(self._recent(now_s - 2 * window_s), self._slo_s, max(moved_s, now_s - 2 * window_s))
        busy = nodes.groupby("node").cpu_utilization.mean()
        if not self._armed:  # what was detected before is no news to the models
            self._changes.clear()
        self._armed = "change" in self._policy.asked
        situation = Situation(
            now_s,
            problem,
            self._settings(),
            self._history,
            self._cost.uncertainty,
            measured=measured,
            busy={str(node): float(share) for node, share in busy.items()},
            ready=self._ready(),
            ahead=ahead(problem, estimates),
        )
        if "tick" in self._policy.asked:
            self._ask(situation, situation.settings, self._loop.tick_s)
        self._look_ahead()

    def _fit(self, telemetry: Telemetry) -> None:
        """Fit the cost model, and let the estimate start from it. DataError if the telemetry is not sufficient."""
        jumps = speed_jumps(self._estimates(), self._agenda.now_s)
        self._cost = fit_cost_model(telemetry, self._features, self._cost, hold_out=False, jumps=jumps)
        self._estimate.set_model(self._cost)
        self._fit_due_s = self._agenda.now_s + self._loop.fit_s

    def _settings(self) -> Settings:
        return replace(self._loop.settings, registry_bytes_per_s=registry_bytes_per_s(self._deployment.history))

    def _posed(self, demand: Sequence[RequestClass]) -> Problem:
        live = self._deployment.live
        return problem_from(
            self._cost,
            self._features,
            self._cluster,
            self._states,
            demand,
            live.placement if live else None,
            self._lost,
        )

    # --- the fast loop

    def _passed(self, done: PassTime) -> None:
        """Take the times of a pass; ignore passes during which blocks were loaded."""
        if done.at_s - done.total_s <= self._disturbed_until_s:
            return
        self._note(self._estimate.observe(done))
        self._look_into(self._estimate.suspects(done))

    def _reported(self, report: Report) -> None:
        now_s, estimate, node = self._agenda.now_s, self._estimate, report.node
        if not math.isnan(report.reference_s):
            self._note(estimate.observe_report(node, report.reference_s, report.background_utilization, now_s))
            if self._remeasurement is not None and estimate.doubts(node):
                self._remeasurement.of_node(node)
        for echo in report.links:
            self._note(estimate.links.observe(node, echo.peer, echo.size_bytes, echo.seconds, echo.at_s))
        self._look_into(estimate.links.doubted())

    def _look_into(self, links: Sequence[tuple[str, str]]) -> None:
        """Measure links both ways now, unless that is under way, and again while the detector doubts them."""
        if links and self._remeasurement is not None:  # hardly ever
            self._remeasurement.of_links(both_ways(links))

    def _note(self, changes: Sequence[Change]) -> None:
        if not changes:
            return
        self._changes += changes
        self._fit_due_s = -math.inf
        self._react_soon()

    def _react_soon(self) -> None:
        if self._changes and not self._reacting and self._armed and not self._stopped:
            self._reacting = True
            self._agenda.after(0.0, self._react)

    def _react(self) -> None:
        """Ask about the changes that were detected, with the models that the last tick set."""
        changes, self._changes = self._changes, []
        if changes and self._problem is not None and self._deployment.live is not None:
            self._ask_about(changes, self._agenda.now_s, 1)
        else:
            self._reacting = False

    def _ask_about(self, changes: list[Change], noticed_s: float, plans: int) -> None:
        live = self._deployment.live
        assert live is not None
        now_s, problem, ready, settings = self._agenda.now_s, self._present_problem(), self._ready(), self._settings()
        if not moved_often(self._deployment.history, now_s):
            settings = replace(settings, cooldown_s=0.0)
        situation = Situation(
            now_s,
            problem,
            settings,
            self._history,
            self._cost.uncertainty,
            tuple(changes),
            ready=ready,
            ahead=ahead(problem, self._estimates()),
        )
        decision = self._choose(situation)
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
        now_s, measured = self._agenda.now_s, self._remeasurement
        if now_s < until_s and not self._changes and measured is not None and measured.may_end_doubts:
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
        took_s = self._agenda.now_s - noticed_s
        if decision is not None:
            decision = replace(decision, at_s=noticed_s)
            if decision.action == "keep":
                self.decisions.append(replace(decision, outcome=DecisionOutcome(plan_s=took_s)))
            else:
                self._deploy(decision, based_on, self._loop.settings, took_s, changes)
        self._react_soon()
        self._look_ahead()

    def _present_problem(self) -> Problem:
        """The problem of the last tick under what is known and asked for now."""
        live = self._deployment.live
        assert live is not None
        assert self._problem is not None
        posed = replace(
            without(self._problem, self._lost),
            current=live.placement,
            classes=tuple(self._gateway.journal.demand(DEMAND_WINDOW_S)),
        )
        return under_estimates(posed, self._estimates())

    # --- ready before it is needed

    def _look_ahead(self) -> None:
        if self._readiness is not None and self._armed:
            self._readiness.look()

    def _is_idle(self) -> bool:
        """Whether there is a problem to prepare for, and nothing else is being decided."""
        idle = not self._reacting and not self._stopped and self._problem is not None
        return idle and self._deployment.live is not None

    def _ready(self) -> Ready:
        return NOTHING_READY if self._readiness is None else self._readiness.ready()

    def _estimates(self) -> Estimates:
        return replace(self._estimate.estimates(self._agenda.now_s), rates_rps=self._gateway.journal.rates())

    # --- decide and deploy

    def _ask(self, situation: Situation, settings: Settings, took_s: float) -> None:
        """Ask the policy. Its answer is deployed after the time that planning takes."""
        decision, live = self._choose(situation), self._deployment.live
        if decision is None:
            return
        if decision.action == "keep" or live is None:
            self.decisions.append(replace(decision, outcome=DecisionOutcome(plan_s=took_s)))
        else:
            self._agenda.after(took_s, self._deploy, decision, live.epoch, settings, took_s)

    def _choose(self, situation: Situation) -> Decision | None:
        """What the policy answers; None, and an entry in the log, after an error."""
        try:
            decision = self._policy.decide(situation, self._rng)
        except ResplitError as error:
            self.decisions.append(Decision(situation.now_s, "keep", str(error)))
            return None
        return replace(decision, seen=tuple(map(str, situation.changes)))

    def _deploy(
        self,
        decision: Decision,
        based_on: int,
        settings: Settings,
        took_s: float,
        changes: Sequence[Change] = (),
    ) -> None:
        """Deploy a decision. If another move is under way, its `changes` are decided on again once that is live."""
        begun_s, place = self._agenda.now_s, len(self.decisions)
        self.decisions.append(decision)

        def live(epoch: LiveEpoch) -> None:
            self._disturbed_until_s = self._agenda.now_s
            self._fit_due_s = -math.inf
            self._history = self._history.moved(decision.move(self._agenda.now_s), settings)
            self._gateway.recall({change.subject for change in changes if change.after > change.before}, epoch.epoch)
            self._look_ahead()
            self._changes[:0], self._refused = self._refused, []
            self._react_soon()
            self.decisions[place] = replace(
                decision, outcome=DecisionOutcome(epoch.epoch, None, took_s, self._agenda.now_s - begun_s)
            )

        try:
            self._deployment.deploy(decision.proposal(based_on), live)
            self._disturbed_until_s = math.inf
        except ProposalRefusedError as error:
            self._refused += changes
            self.decisions[place] = replace(decision, outcome=DecisionOutcome(refused=str(error), plan_s=took_s))

    def _recent(self, since_s: float) -> list[SessionRecord]:
        """The records of the requests that ended since then."""
        recent: list[SessionRecord] = []
        for record in reversed(self._gateway.records):
            ended_s = record.token_times_s[-1] if record.token_times_s else record.arrival_s
            if ended_s < since_s:
                break
            recent.append(record)
        return recent[::-1]

    # --- recovery

    def _notice(self, node: str) -> None:
        self._lost.add(node)
        self._gateway.lose(node)
        if self._gateway.broken:
            self._recover()

    def _recover(self) -> None:
        """Plan without the nodes that are lost, and deploy: the live epoch cannot serve."""
        live, problem = self._deployment.live, self._problem
        if live is None or problem is None:
            return
        proposal = self._planned_for(problem, live.epoch) or self._replanned(problem, live)
        if proposal is None:
            self._agenda.after(0.25, self._recover_again)
            return
        try:
            self._deployment.deploy(proposal, lambda epoch: None)
        except ProposalRefusedError:  # another epoch is being prepared
            self._agenda.after(0.25, self._recover_again)

    def _planned_for(self, problem: Problem, epoch: int) -> Proposal | None:
        """The placement that was planned for this loss."""
        placement = self._readiness.after_loss(sorted(self._lost)) if self._readiness is not None else None
        return planned_for(problem, placement, self._lost, epoch)

    def _replanned(self, problem: Problem, live: SimulatedRoute) -> Proposal | None:
        plan = plan_without(problem, self._lost, live.placement, self._loop.settings.work_limit).plan
        if plan.placement is None or plan.terms is None:
            return None
        return Proposal(plan.placement, RECOVER, live.epoch, plan.terms.latency_s, plan.lower_bound)

    def _recover_again(self) -> None:
        if self._gateway.broken:
            self._recover()
