"""Plan and decide: from a cost model and the present state to a plan or a decision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import TypeAdapter

from resplit.cluster.client import ControlClient
from resplit.cluster.state import plan_or_fail, problem_now
from resplit.config import ClusterConfig
from resplit.cost import CostModel
from resplit.decide import Decision, History, Measured, Settings, decide
from resplit.epochs import LiveEpoch
from resplit.files import write_atomically
from resplit.problem import problem_to_json
from resplit.session_records import SessionRecord
from resplit.status import ModelStatus
from resplit.telemetry import Telemetry
from resplit.types import Plan, Problem

_HISTORY = TypeAdapter(History)


@task(name="problem", retries=1, retry_delay_seconds=0.5, cache_policy=NO_CACHE)
def problem(
    client: ControlClient,
    cluster: ClusterConfig,
    cost: CostModel,
    telemetry: Telemetry,
    live: ModelStatus,
    window_s: float,
) -> Problem:
    """The placement problem as it stands, for the demand of the last `window_s` seconds."""
    return problem_now(client, cluster, cost, telemetry, live, window_s)


@task(name="plan", cache_policy=NO_CACHE)
def plan(problem: Problem) -> Plan:
    """The best plan; InfeasibleError with the reason where there is none."""
    return plan_or_fail(problem)


@task(name="decide", cache_policy=NO_CACHE)
def choose(
    problem: Problem, cost: CostModel, measured: Measured | None, history: History, settings: Settings, now_s: float
) -> Decision:
    """Keep, redistribute, re-split or roll back."""
    return decide(
        problem, now_s=now_s, settings=settings, history=history, uncertainty=cost.uncertainty, measured=measured
    )


def measured_since(records: list[SessionRecord], slo_s: dict[str, float | None], since_s: float) -> Measured | None:
    """What requests that arrived since `since_s` and ended took, and which classes miss their objective on average."""
    ended = [r for r in records if r.arrival_s >= since_s and r.status == 200]
    if not ended:
        return None
    latency_s = {id(r): r.end_s - r.arrival_s for r in ended}
    missed = sorted(
        name
        for name, limit_s in slo_s.items()
        if limit_s is not None
        and (mine := [latency_s[id(r)] for r in ended if r.request_class == name])
        and sum(mine) / len(mine) > limit_s
    )
    spread_s = float(np.std(list(latency_s.values()))) / math.sqrt(len(ended))
    return Measured(sum(latency_s.values()) / len(ended), len(ended), tuple(missed), spread_s)


def registry_speed(epochs: list[LiveEpoch]) -> float | None:
    """Bytes of weights per second that nodes fetched and loaded in the epochs so far; None before they loaded any."""
    loading = [epoch for epoch in epochs if epoch.loaded_bytes > 0]
    seconds = sum(epoch.prepare_s for epoch in loading)
    return sum(epoch.loaded_bytes for epoch in loading) / seconds if seconds > 0 else None


def load_history(path: Path) -> History:
    """The history of moves that earlier ticks left; an empty one where there is none."""
    return _HISTORY.validate_python(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else History()


def save_history(history: History, path: Path) -> None:
    """Keep the history of moves for the next tick."""
    write_atomically(path, json.dumps(_HISTORY.dump_python(history)))


def load_configurations(folder: Path, epochs: list[int]) -> dict[int, Path]:
    """Where `save_configuration` kept each of these epochs, for those that it did."""
    return {epoch: folder / str(epoch) for epoch in epochs if (folder / str(epoch)).exists()}


def save_configuration(folder: Path, problem: Problem, placed: dict[str, Any], telemetry: Telemetry) -> None:
    """Keep what one configuration was decided from: problem, plan or decision, telemetry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problem.json").write_text(json.dumps(problem_to_json(problem), indent=1), encoding="utf-8")
    (folder / "plan.json").write_text(json.dumps(placed, indent=1, default=str), encoding="utf-8")
    telemetry.save(folder / "telemetry")
