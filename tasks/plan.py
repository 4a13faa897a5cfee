"""Plan and decide, and keep the history of moves and the inputs of configurations in files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import plan_or_fail, problem_now
from resplit.config import ClusterConfig
from resplit.cost import CostModel
from resplit.decide import Decision
from resplit.estimate import under_estimates
from resplit.planner.best_effort import BestEffortPlan
from resplit.policies import Policy, Situation
from resplit.problem import problem_to_json
from resplit.status import ModelStatus
from resplit.telemetry.tables import Telemetry
from resplit.types import Problem


@task(name="problem", retries=1, retry_delay_seconds=0.5, cache_policy=NO_CACHE)
def problem(
    client: ControlClient,
    cluster: ClusterConfig,
    cost: CostModel,
    telemetry: Telemetry,
    live: ModelStatus,
    window_s: float,
) -> Problem:
    """The placement problem of the present state, with the demand of the last `window_s` seconds.

    What the controller estimates of the nodes from their last passes is newer than the telemetry, and prevails.
    """
    posed = problem_now(client, cluster, cost, telemetry, live, window_s)
    return under_estimates(posed, client.estimates())


@task(name="plan", cache_policy=NO_CACHE)
def plan(problem: Problem) -> BestEffortPlan:
    """The best plan, if need be for a part of the demand; InfeasibleError with the reason if there is none."""
    return plan_or_fail(problem)


@task(name="decide", cache_policy=NO_CACHE)
def choose(policy: Policy, situation: Situation, rng: np.random.Generator) -> Decision:
    """Ask a policy what to do at a tick."""
    return policy.decide(situation, rng)


def load_configurations(folder: Path, epochs: list[int]) -> dict[int, Path]:
    """The folders that `save_configuration` wrote for these epochs, by epoch."""
    return {epoch: folder / str(epoch) for epoch in epochs if (folder / str(epoch)).exists()}


def save_fast_configurations(client: ControlClient, folder: Path, window_s: float, since: int) -> int:
    """Keep the inputs of the epochs that the fast loop deployed, by the entries of the decision log after `since`.

    The telemetry is that of the `window_s` seconds before the decision. Returns the number of the last entry.
    """
    for decision in client.decisions(since):
        since = decision.id or since
        epoch = decision.outcome.deployed if decision.outcome else None
        if epoch is None or (folder / str(epoch)).exists():
            continue
        if (posed := client.problem_of(epoch)) is not None:
            telemetry = client.telemetry(decision.at_s - window_s)
            save_configuration(folder / str(epoch), posed, decision, telemetry)
    return since


def save_configuration(folder: Path, problem: Problem, decision: Decision, telemetry: Telemetry) -> None:
    """Keep the inputs of one configuration: its problem, the decision for it, and the telemetry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problem.json").write_text(json.dumps(problem_to_json(problem), indent=1), encoding="utf-8")
    (folder / "plan.json").write_text(json.dumps(decision.to_json(), indent=1), encoding="utf-8")
    telemetry.save(folder / "telemetry")
