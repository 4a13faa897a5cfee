"""Serve one workload on a running cluster under one policy, from the same start each time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from flows.adapt import adapt
from flows.params import Params
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, running
from resplit.cluster.supervision import supervised
from resplit.comparison import SATURATED, UNDISTURBED
from resplit.cost import CostModel
from resplit.decide import History
from resplit.files import write_atomically
from resplit.planner.best_effort import BestEffortPlan
from resplit.policies import make_policy
from resplit.policies.foresight import ForeseenMove, foresee
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig
from resplit.traces import traced_requests
from resplit.types import Problem
from resplit.workload import schedule_requests
from tasks.changes import reset
from tasks.deploy import deploy_plan
from tasks.fit import last_good_model
from tasks.foresee import move_on_schedule
from tasks.measure import measure, measure_estimate, serve_workload
from tasks.workload import load_words

__all__ = ["Run", "Serving", "supervised_cluster", "undisturbed", "yield_to_nodes"]

_log = structlog.get_logger(__name__)
_START_IN_S = 0.5  # the requests, the changes and the policy begin at one moment
_STREAMS = 12  # that always wait in a saturated run


@dataclass(frozen=True)
class Run:
    """One run of a study: a policy under a scenario, with the requests of a seed."""

    policy: str
    scenario: ScenarioConfig
    seed: int


def undisturbed(scenario: ScenarioConfig) -> ScenarioConfig:
    """The scenario without its changes."""
    return scenario.model_copy(update={"name": UNDISTURBED, "nodes": (), "links": (), "load": ()})


@dataclass(frozen=True)
class Serving:
    """A running cluster, its declared state as a problem with the model that posed it, and the plan for the start."""

    cluster: Cluster
    client: ControlClient
    params: Params
    cost: CostModel
    posed: Problem
    first: BestEffortPlan

    def serve(self, run: Run) -> RunRecord:
        """Serve one run, starting with the cluster as declared and without a history. Must be called in a flow."""
        self._begin_anew()
        declared, params = self.cluster.config, self.params
        traced = traced_requests(run.scenario, Path())
        requests = schedule_requests(declared, run.scenario, run.seed, load_words(params.prompts), traced)
        first_record, last = len(self.client.records()), self.client.last_decision()
        foreseen = self._foresee(run.scenario)
        _log.info("run begins", policy=run.policy, scenario=run.scenario.name, seed=run.seed, requests=len(requests))
        start_s, streams = time.time() + _START_IN_S, _STREAMS if run.scenario.name == SATURATED else 0
        serving = serve_workload.submit(
            self.cluster, self.client.model().name, requests, run.scenario, start_s, streams
        )
        try:
            self._decide(run, foreseen, start_s)
            sent = serving.result()
            cost = last_good_model(self.cluster.state / "cost.json")  # of the last tick
            errors = measure_estimate(self.client, declared, run.scenario, cost)
        finally:
            self.client.arm_fast_loop(params.adapt.settings(), 0)
            reset(self.client, self.cluster, declared, run.scenario)
        known_s = tuple(move.at_s for move in foreseen)
        return measure(
            self.client, declared, run.scenario, run.policy, run.seed, sent, first_record, last, known_s, errors
        )

    def _begin_anew(self) -> None:
        self.client.set_moves(History())
        write_atomically(self.cluster.state / "cost.json", self.cost.to_json())
        self.client.set_problem(self.posed, self.cost)
        deploy_plan(self.client, self.first, self.client.model().epoch)

    def _foresee(self, scenario: ScenarioConfig) -> list[ForeseenMove]:
        """The moves of a policy that knows the scenario: what others do is judged at the changes at which it moves."""
        policy, settings = make_policy("clairvoyant"), self.params.adapt.settings()
        posed = replace(self.posed, current=self.first.plan.placement)
        return foresee(posed, self.cluster.config, scenario, policy, settings)

    def _decide(self, run: Run, foreseen: list[ForeseenMove], start_s: float) -> None:
        """Have the policy of the run decide until its end."""
        loop, duration_s = self.params.adapt, run.scenario.duration
        asked = make_policy(run.policy).asked
        if "schedule" in asked:
            move_on_schedule(self.client, foreseen, start_s, start_s + duration_s)
        elif asked:
            adapt(
                self.cluster.url,
                self.cluster.state,
                loop.period_s,
                duration_s,
                loop.window_s,
                loop.settings(),
                start_s,
                policy=run.policy,
            )


@contextlib.contextmanager
def supervised_cluster(params: Params, state: Path) -> Iterator[Cluster]:
    """The cluster of a study. Nodes that end are started again.

    The controller is not: the records of the study end with it, so the study ends with an error.
    """
    with running(params.cluster, state, params.model) as cluster, supervised(cluster, cluster.config.node_names):
        yield cluster


def yield_to_nodes() -> None:
    """Let the processes of nodes run before this one: real machines do not share their cores with the control loop."""
    os.nice(10)
