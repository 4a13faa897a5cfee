"""The slow loop in simulated time: Algorithm 1 of the paper, once in each period."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from resplit.config import ClusterConfig
from resplit.decide import Decision, measured_since, registry_bytes_per_s
from resplit.errors import DataError
from resplit.estimate import ahead, under_estimates
from resplit.policies import Situation
from resplit.session_records import SessionRecord
from resplit.simulate.agenda import Agenda
from resplit.simulate.decisions import SimulatedDecisions
from resplit.simulate.deployment import SimulatedDeployment
from resplit.simulate.fast_loop import SimulatedFastLoop
from resplit.simulate.gateway import SimulatedGateway
from resplit.simulate.loop import Loop
from resplit.simulate.planning import SimulatedPlanner
from resplit.simulate.reports import Reports

__all__ = ["SimulatedSlowLoop"]


class SimulatedSlowLoop:
    """The slow loop of one cluster. Each tick sets the models of the fast loop; it decides if the policy `is_asked`."""

    def __init__(
        self,
        is_asked: bool,
        cluster: ClusterConfig,
        loop: Loop,
        planner: SimulatedPlanner,
        decisions: SimulatedDecisions,
        fast_loop: SimulatedFastLoop,
        deployment: SimulatedDeployment,
        gateway: SimulatedGateway,
        reports: Reports,
        agenda: Agenda,
    ) -> None:
        self._is_asked = is_asked
        self._loop = loop
        self._planner = planner
        self._decisions = decisions
        self._fast_loop = fast_loop
        self._deployment = deployment
        self._gateway = gateway
        self._reports = reports
        self._agenda = agenda
        self._slo_s: Mapping[str, float | None] = {declared.name: declared.slo for declared in cluster.classes}
        self._stopped = False

    def start(self) -> None:
        """Begin to tick, a period from now."""
        self._agenda.after(self._loop.period_s, self._tick)

    def stop(self) -> None:
        """Stop ticking."""
        self._stopped = True

    def _tick(self) -> None:
        """Observe, fit, decide, propose."""
        if self._stopped:
            return
        self._agenda.after(self._loop.period_s, self._tick)
        now_s, window_s, live = self._agenda.now_s, self._loop.window_s, self._deployment.live
        if live is None:
            return
        if now_s >= self._planner.fit_due_s:
            try:
                self._planner.fit(self._reports.window(now_s - window_s), self._loop.fit_s)
            except DataError as error:
                self._decisions.log.append(Decision(now_s, "keep", str(error)))
                return
        situation = self._situation()
        self._fast_loop.arm()
        if self._is_asked:
            self._decisions.ask(situation, self._loop.tick_s)
        self._fast_loop.look_ahead()

    def _situation(self) -> Situation:
        """What the policy is asked about: the demand, nodes and links of the last window, and the estimates now."""
        now_s, window_s, planner, history = (
            self._agenda.now_s,
            self._loop.window_s,
            self._planner,
            self._decisions.history,
        )
        nodes = self._reports.node_table(now_s - window_s)
        planner.read(nodes)
        posed, estimates = planner.pose(self._gateway.journal.demand(2 * window_s)), planner.estimates()
        problem = under_estimates(posed, estimates)
        moved_s = history.last.at_s if history.last else 0.0
        measured = measured_since(self._recent(now_s - 2 * window_s), self._slo_s, max(moved_s, now_s - 2 * window_s))
        busy = nodes.groupby("node").cpu_utilization.mean()
        return Situation(
            now_s,
            problem,
            replace(self._loop.settings, registry_bytes_per_s=registry_bytes_per_s(self._deployment.history)),
            history,
            planner.cost.uncertainty,
            measured=measured,
            busy={str(node): float(share) for node, share in busy.items()},
            ready=self._fast_loop.ready(),
            ahead=ahead(problem, estimates),
        )

    def _recent(self, since_s: float) -> list[SessionRecord]:
        """The records of the requests that ended since then."""
        recent: list[SessionRecord] = []
        for record in reversed(self._gateway.records):
            ended_s = record.token_times_s[-1] if record.token_times_s else record.arrival_s
            if ended_s < since_s:
                break
            recent.append(record)
        return recent[::-1]
