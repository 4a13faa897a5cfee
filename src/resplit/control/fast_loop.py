"""The fast loop: reacts to detected changes within a second, with the models that the slow loop set.

Every pass and every report of a node updates the estimate. If it reveals a jump, the loop puts the estimate into the
latest problem, decides with the code that the slow loop uses, and deploys. One decision runs at a time. Changes that
are detected meanwhile are seen by the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.log import EpochLog
from resplit.control.move_history import Moves
from resplit.control.observations import Observations
from resplit.control.planning import DEMAND_WINDOW_S, ControllerPlanner
from resplit.control.readiness import Readiness
from resplit.control.remeasurement import Remeasurement
from resplit.cost.model import CostModel
from resplit.decide import Decision, DecisionOutcome, Ready, Settings, for_a_change, in_words
from resplit.errors import ProposalRefusedError, ResplitError
from resplit.estimate import (
    Change,
    ClusterEstimate,
    Estimates,
    LinkSeen,
    NodeSeen,
    Observation,
    Recording,
    ahead,
    both_ways,
    show,
    under_estimates,
)
from resplit.pass_times import PassTime
from resplit.policies import Policy, Situation
from resplit.process.cancellation import VitalTasks
from resplit.telemetry.rows import TelemetryRows
from resplit.types import Problem

_log = structlog.get_logger(__name__)
# For each of the two plans, and where the search can start from a plan that was made for such a change.
_TIME_LIMIT_S, _READY_TIME_LIMIT_S = 0.15, 0.04
MOST_PLANS = 3  # of one decision: while it is planned, more changes may be detected
_PROBLEMS_KEPT = 64
_REPORTED_LATE_S = 0.5  # nodes are asked for the times of messages so often


@dataclass(frozen=True)
class Armed:
    """How the fast loop decides, and until when (monotonic clock): the slow loop renews this at each tick."""

    policy: Policy
    settings: Settings
    until_s: float


class FastLoop:
    """The fast loop of one cluster. It decides only while it is armed."""

    def __init__(
        self,
        view: ClusterView,
        planner: ControllerPlanner,
        deployment: Deployment,
        readiness: Readiness,
        log: EpochLog,
        moves: Moves,
        tasks: VitalTasks,
    ) -> None:
        self._view = view
        self._planner = planner
        self._deployment = deployment
        self._readiness = readiness
        readiness.pose = self._present_problem
        self._log = log
        self._moves = moves
        self._tasks = tasks
        self._estimate = ClusterEstimate(view.rules.features, view.cluster.source)
        self.remeasurement = Remeasurement(self._estimate.links.doubted, tasks)
        self._uncertainty = 0.0  # of the cost model
        self._armed: Armed | None = None
        self._changes: list[Change] = []  # not seen by any decision yet
        self._changed = asyncio.Event()
        self._observations = Observations()
        self._rng = np.random.default_rng(0)
        self.posed: dict[int, Problem] = {}  # by the epoch that was deployed for it, the latest ones

    def set_model(self, cost: CostModel) -> None:
        """Use the cost model with which the latest problem was posed."""
        self._show(Observation(time.monotonic(), cost=cost))
        self._uncertainty = cost.uncertainty

    def arm(self, policy: Policy, settings: Settings, for_s: float) -> None:
        """Ask `policy` about changes for so many seconds; 0 ends that. A policy that is not asked at changes keeps."""
        if self._armed is None:  # what was detected before is no news to the models
            self._changes.clear()
        until_s = time.monotonic() + for_s
        self._armed = Armed(policy, settings, until_s) if for_s > 0 and "change" in policy.asked else None
        self._readiness.look()

    def estimates(self) -> Estimates:
        """The estimate of each node and link now, and the requests that are expected."""
        return replace(self._estimate.estimates(time.monotonic()), rates_rps=self._view.gateway.rates())

    def recording(self) -> Recording:
        """What the detector was shown in the last minutes, since a cost model was set."""
        return Recording(self._view.rules.features, self._view.cluster.source, self._observations.since_model())

    def passed(self, done: PassTime) -> None:
        """Take the times of a pass. A pass that ran while blocks were loaded says nothing about the time after it."""
        if done.at_s - done.total_s <= self._deployment.disturbed_until_s:
            return
        self._show(Observation(done.at_s, done=done))
        if suspects := self._estimate.suspects(done):
            self.remeasurement.of_links(both_ways(suspects))

    def reported(self, rows: TelemetryRows, time_s: float) -> None:
        """Take the new rows of a node, reported at `time_s` of its clock: the newest about itself, and all its probes.

        A probe that was sent while blocks were loaded or caches moved says nothing about the link.
        """
        now_s = time.monotonic()
        if rows.nodes:
            last = rows.nodes[-1]
            background = last.cpu_utilization - last.own_utilization
            self._show(Observation(now_s, node=NodeSeen(last.node, last.reference_s, background)))
            if self._estimate.doubts(last.node):
                self.remeasurement.of_node(last.node)
        if now_s - _REPORTED_LATE_S <= self._deployment.disturbed_until_s:
            return
        known = self._view.addresses  # what is said about links to others would be kept for ever
        probes = [row for row in rows.links if row.source == "active" and row.peer in known]
        for row in probes:
            at_s = now_s - min(max(time_s - row.time_s, 0.0), _REPORTED_LATE_S)
            self._show(Observation(at_s, link=LinkSeen(row.node, row.peer, row.payload_bytes, row.seconds)))
        self.remeasurement.of_links(both_ways(self._estimate.links.doubted()))

    def _show(self, seen: Observation) -> None:
        self._observations.add(seen)
        self._note(show(self._estimate, seen))

    async def run(self) -> None:
        """Decide after each detected change, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            changes, self._changes = self._changes, []
            if not changes or not self._armed or time.monotonic() > self._armed.until_s:
                continue
            self._readiness.set_idle(False)
            try:
                await self._decide(changes, self._armed)
            except ResplitError as error:
                _log.warning("a change was not decided on", changes=_words(changes), error=str(error))
            except Exception:  # a defect here must not end the service: the slow loop goes on
                _log.exception("a change was not decided on because of a defect", changes=_words(changes))
            finally:
                self._readiness.set_idle(True)
                self._readiness.look()

    def _note(self, changes: Sequence[Change]) -> None:
        for change in changes:
            _log.info("change detected", change=str(change))
        if changes:
            self._changes += changes
            self._changed.set()

    async def _decide(self, changes: Sequence[Change], armed: Armed) -> None:
        live = self._deployment.live
        if live is None:
            return
        begun_s, now_s, changes = time.monotonic(), time.time(), list(changes)
        for plans in itertools.count(1):
            problem = self._problem(live.placement)
            expected = ahead(problem, self.estimates())
            decision = await asyncio.to_thread(
                self._choose, problem, expected, changes, armed, self._readiness.ready(), now_s
            )
            if decision.action != "keep" and concern_links(changes, problem):
                await self._until_doubts_end()
            if not self._changes or plans >= MOST_PLANS:
                break
            # A link degrades in both directions, an uplink with all its links, one detected after the other: what was
            # planned with half of it would have to be moved again.
            changes += self._changes
            self._changes.clear()
        deviations = tuple(change.deviation for change in changes)
        decision = replace(decision, seen=tuple(map(str, changes)), deviations=deviations)
        planned_s, outcome = time.monotonic() - begun_s, DecisionOutcome()
        if decision.action != "keep":
            outcome = await self._deploy(decision, live.epoch, armed.settings)
        if outcome.deployed is not None:
            self._keep_problem(outcome.deployed, problem)
            slower = {change.subject for change in changes if change.is_slower}
            self._tasks.spawn(self._deployment.recall(slower), "recall passes")
        outcome = replace(outcome, plan_s=planned_s, prepare_s=time.monotonic() - begun_s - planned_s)
        decision = replace(decision, outcome=outcome)
        self._log.append_decision(decision)
        _log.info("decided", words=" ".join(in_words(decision)), reason=decision.reason, plan_s=planned_s)
        if outcome.refused is not None and await self._deployment.replaced(live.epoch):
            self._changes[:0] = changes  # the plan was for a placement that another move has replaced
            self._changed.set()

    async def _until_doubts_end(self) -> None:
        """Wait for measurements of links in doubt, but not long, and not once one of them is known to have changed."""
        if not self._changes:
            self._changed.clear()  # it was set for changes that are decided on now
            await self.remeasurement.until_doubts_end(self._changed)

    def _keep_problem(self, epoch: int, problem: Problem) -> None:
        self.posed[epoch] = problem
        if len(self.posed) > _PROBLEMS_KEPT:
            del self.posed[min(self.posed)]

    def _problem(self, placement: tuple[str, ...]) -> Problem:
        return under_estimates(self._planner.present_problem(placement, DEMAND_WINDOW_S), self.estimates())

    def _present_problem(self) -> Problem | None:
        """The present problem while the loop decides on changes; None otherwise. DataError if there is none yet."""
        live = self._deployment.live
        if live is None or not self._armed or time.monotonic() > self._armed.until_s:
            return None
        return self._problem(live.placement)

    def _choose(
        self,
        problem: Problem,
        expected: Problem,
        changes: Sequence[Change],
        armed: Armed,
        ready: Ready,
        now_s: float,
    ) -> Decision:
        limit_s = _READY_TIME_LIMIT_S if ready.placements else _TIME_LIMIT_S
        settings = replace(for_a_change(armed.settings, self._deployment.history, now_s), time_limit_s=limit_s)
        situation = Situation(
            now_s,
            problem,
            settings,
            self._moves.history,
            self._uncertainty,
            tuple(changes),
            ready=ready,
            ahead=expected,
        )
        return armed.policy.decide(situation, self._rng)

    async def _deploy(self, decision: Decision, based_on: int, settings: Settings) -> DecisionOutcome:
        try:
            live = await self._deployment.deploy(decision.proposal(based_on), gives_way=True)
        except ProposalRefusedError as error:
            return DecisionOutcome(refused=str(error))
        self._moves.moved(decision.move(live.committed_s), settings)
        return DecisionOutcome(deployed=live.epoch)


def concern_links(changes: Sequence[Change], problem: Problem) -> bool:
    """Whether any of these changes is that of a link."""
    nodes = {node.name for node in problem.nodes}
    return any(change.subject not in nodes for change in changes)


def _words(changes: Sequence[Change]) -> str:
    return "; ".join(map(str, changes))
