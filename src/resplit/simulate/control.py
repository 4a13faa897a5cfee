"""The control of a simulated cluster: both loops and recovery, put together, and what a scenario does to them.

Cost model, estimate, planner and policies are those of a cluster. What they see is what a cluster would report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from resplit.config import ClusterConfig
from resplit.control.rules import PlacementRules
from resplit.cost import CostModel
from resplit.decide import Decision
from resplit.policies import Policy, Situation
from resplit.simulate.agenda import Agenda
from resplit.simulate.decisions import SimulatedDecisions
from resplit.simulate.deployment import SimulatedDeployment
from resplit.simulate.fast_loop import SimulatedFastLoop
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.loop import Loop
from resplit.simulate.planning import SimulatedPlanner
from resplit.simulate.recovery import SimulatedRecovery
from resplit.simulate.reports import Reports
from resplit.simulate.slow_loop import SimulatedSlowLoop
from resplit.types import BlockFeatures, Problem

__all__ = ["Control"]


class Control:
    """What decides in one simulated cluster. Without `reports`, no loop runs."""

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
        self._policy = policy
        self._loop = loop
        self._deployment = deployment
        self._gateway = gateway
        self._reports = reports
        self._agenda = agenda
        self._planner = planner = SimulatedPlanner(cluster, features, cost, deployment, gateway, agenda)
        self._decisions = decisions = SimulatedDecisions(policy, deployment, gateway, agenda, rng)
        self._recovery = SimulatedRecovery(planner, deployment, gateway, agenda, loop.settings.work_limit)
        self._stopped = False
        self._fast_loop: SimulatedFastLoop | None = None
        self._slow_loop: SimulatedSlowLoop | None = None
        if reports is not None:
            asked, rules = policy.asked, PlacementRules(cluster, tuple(features))
            self._fast_loop = fast = SimulatedFastLoop(
                "change" in asked, rules, loop, planner, decisions, deployment, reports, agenda
            )
            self._slow_loop = SimulatedSlowLoop(
                "tick" in asked, cluster, loop, planner, decisions, fast, deployment, gateway, reports, agenda
            )
            self._recovery.after_loss = fast.after_loss
            decisions.on_live = self._moved

    @property
    def log(self) -> list[Decision]:
        """All decisions."""
        return self._decisions.log

    def start(self) -> None:
        """Begin the loops."""
        if self._fast_loop is not None and self._slow_loop is not None and self._reports is not None:
            self._gateway.passes.on_pass = self._fast_loop.passed
            self._slow_loop.start()
            self._reports.on_report = self._fast_loop.reported

    def first_problem(self) -> Problem:
        """The problem of the declared demand, before anything is placed."""
        return self._planner.pose(self._gateway.journal.demand(1.0))

    def stop(self) -> None:
        """Stop deciding: the workload has ended."""
        self._stopped = True
        for each in (self._fast_loop, self._slow_loop):
            if each is not None:
                each.stop()

    def scheduled(self, problem: Problem) -> None:
        """A phase of the scenario begins, described by `problem`: ask a policy that knows the scenario."""
        live = self._deployment.live
        if "schedule" in self._policy.asked and live is not None and not self._stopped:
            posed = replace(problem, current=live.placement)
            situation = Situation(self._agenda.now_s, posed, self._loop.settings, self._decisions.history)
            self._decisions.ask(situation, 0.0)

    def lost(self, node: str) -> None:
        """A node went down. The cluster notices that a little later, and then plans without it."""
        self._agenda.after(self._loop.noticed_s, self._recovery.notice, node)

    def returned(self, node: str) -> None:
        """A node is back."""
        self._recovery.returned(node)
        if self._fast_loop is not None:
            self._fast_loop.look_ahead()

    def _moved(self) -> None:
        """A move that was decided is live."""
        self._planner.fit_soon()
        if self._fast_loop is not None:
            self._fast_loop.moved()
