"""The home day on the testbed or on emulated hardware: undisturbed, static and adaptive, each from the same start."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from prefect import flow

from benchmarks.testbed.layout import faster_scenario
from benchmarks.testbed.machines import Pace, Testbed, running
from flows.adapt import adapt
from flows.params import Params
from flows.profile import profile
from flows.serving import Run, Serving, supervised_cluster, undisturbed
from resplit.cluster.client import ControlClient
from resplit.cost import CostModel
from resplit.decide import History
from resplit.phases import Phase, declared_phase, phases_of
from resplit.planner.best_effort import BestEffortPlan
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig
from resplit.types import Problem
from resplit.workload import schedule_requests
from tasks.deploy import deploy_plan
from tasks.measure import measure
from tasks.plan import plan, problem
from tasks.workload import load_words, send

__all__ = ["calibrated", "on_emulation", "on_testbed"]

_log = structlog.get_logger(__name__)
_START_IN_S, _SETTLE_S = 0.5, 4.0


@dataclass(frozen=True)
class Start:
    """Where each run starts: the measured cost model, the problem that it poses, and the best plan for that."""

    cost: CostModel
    posed: Problem
    first: BestEffortPlan


def runs_of(scenario: ScenarioConfig, seed: int) -> list[Run]:
    """The runs that are compared."""
    return [Run("static", undisturbed(scenario), seed), Run("static", scenario, seed), Run("resplit", scenario, seed)]


def on_emulation(params: Params, scenario: ScenarioConfig, state: Path) -> list[RunRecord]:
    """The runs on nodes that sleep as long as the declared hardware would compute."""

    @flow(name="emulated home day", validate_parameters=False)
    def serve_all() -> list[RunRecord]:
        with supervised_cluster(params, state) as cluster, ControlClient(cluster.url, cluster.token) as client:
            valid, cost = profile(cluster.url, state)
            posed = problem(client, cluster.config, cost, valid.telemetry, client.model(), 1.0)
            serving = Serving(cluster, client, params, cost, posed, plan(posed))
            return [serving.serve(run) for run in runs_of(scenario, params.seed)]

    return serve_all()


def on_testbed(params: Params, scenario: ScenarioConfig, state: Path, pace: Pace) -> list[RunRecord]:
    """The runs on nodes that compute with quotas, over links that are shaped."""
    scenario = faster_scenario(scenario, pace.load)
    with running(params.cluster, state, params.model, pace) as testbed, client_of(testbed) as client:
        start = calibrated(testbed, client)
        return [_serve(testbed, client, params, start, run) for run in runs_of(scenario, params.seed)]


def client_of(testbed: Testbed) -> ControlClient:
    """A client of the testbed's controller."""
    return ControlClient(testbed.cluster.url, testbed.cluster.token)


def calibrated(testbed: Testbed, client: ControlClient) -> Start:
    """Set the quotas, and plan for what the nodes then measure of themselves."""
    testbed.limit(tuple(block.kind for block in client.model().features))
    cost, posed = _measured(testbed, client)
    found = plan(posed)
    _log.info("first plan", placement=" ".join(found.plan.placement or ()))
    return Start(cost, posed, found)


def _measured(testbed: Testbed, client: ControlClient) -> tuple[CostModel, Problem]:
    valid, cost = profile(testbed.cluster.url, testbed.cluster.state)
    return cost, problem(client, testbed.cluster.config, cost, valid.telemetry, client.model(), 1.0)


def _serve(testbed: Testbed, client: ControlClient, params: Params, start: Start, run: Run) -> RunRecord:
    """One run. Unlike `flows.serving.Serving` it changes quotas and links, not declarations."""
    client.set_moves(History())
    client.set_problem(start.posed, start.cost)
    deploy_plan(client, start.first, client.model().epoch)
    time.sleep(_SETTLE_S)  # what an earlier run left in queues and in estimates
    scenario, declared, model = run.scenario, testbed.declared, client.model().name
    requests = schedule_requests(declared, scenario, run.seed, load_words(params.prompts))
    first_record, last, start_s = len(client.records()), client.last_decision(), time.time() + _START_IN_S
    phases = phases_of(declared, scenario)
    unchanged = undisturbed(scenario)  # `send` changes emulated nodes; `_play` does it here
    _log.info("run begins", policy=run.policy, scenario=scenario.name, requests=len(requests))
    stop = threading.Event()
    playing = threading.Thread(target=_play, args=(testbed, phases, start_s, stop), daemon=True)
    playing.start()
    try:
        if run.policy == "resplit":
            deciding = threading.Thread(target=_decide, args=(testbed, params, run, start_s), daemon=True)
            deciding.start()
        sent = send(testbed.cluster, model, requests, unchanged, start_s)
    finally:
        stop.set()
        playing.join()
        client.arm_fast_loop(params.adapt.settings(), 0)
        _make(testbed, declared_phase(declared, scenario), {subject for each in phases for subject in each.changed})
    foreseen = tuple(phase.at_s for phase in phases if phase.changed)
    return measure(client, declared, scenario, run.policy, run.seed, sent, first_record, last, foreseen)


def _decide(testbed: Testbed, params: Params, run: Run, start_s: float) -> None:
    loop, cluster = params.adapt, testbed.cluster
    adapt(
        cluster.url,
        cluster.state,
        loop.period_s,
        run.scenario.duration,
        loop.window_s,
        loop.settings(),
        start_s,
        policy=run.policy,
    )


def _play(testbed: Testbed, phases: Sequence[Phase], start_s: float, stop: threading.Event) -> None:
    """Make each change at its time."""
    for phase in phases:
        if phase.changed and not stop.wait(max(0.0, start_s + phase.at_s - time.time())):
            _log.info("scenario change", label="; ".join(phase.labels))
            _make(testbed, phase, phase.changed)


def _make(testbed: Testbed, phase: Phase, changed: frozenset[object] | set[object]) -> None:
    for name, node in phase.nodes.items():
        if name in changed:
            testbed.set_node(name, node)
    for pair, link in phase.links.items():
        if pair in changed:
            testbed.set_link(pair, link)
