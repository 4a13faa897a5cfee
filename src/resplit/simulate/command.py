"""`resplit simulate`: read a scenario and its cluster, simulate a policy or all of them, print one JSON object each."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from resplit.config import ClusterConfig, load_cluster
from resplit.decide import Settings
from resplit.errors import ConfigError
from resplit.metrics import energy_j_per_request, summarise
from resplit.model import DEFAULT_MODEL
from resplit.policies import POLICIES, make_policy
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig, cluster_of, load_scenario
from resplit.simulate.control import Loop
from resplit.simulate.models import load_model
from resplit.simulate.run import simulate
from resplit.traces import traced_requests, with_traces
from resplit.types import BlockFeatures
from resplit.workload import Arrival, schedule_arrivals

__all__ = ["World", "run_policy", "simulate_command"]

_MODELS = Path("data/models")
_WORK_LIMIT = 2000  # solver steps of each plan, so that the same run gives the same plans
_SHORT_S = 600.0  # shorter scenarios compress a day into minutes


@dataclass(frozen=True, eq=False)
class World:
    """What is simulated: a cluster with a model, a scenario, and the folder of its traces."""

    cluster: ClusterConfig
    features: tuple[BlockFeatures, ...]
    scenario: ScenarioConfig
    folder: Path

    @classmethod
    def load(cls, scenario_file: Path, cluster_file: Path | None = None, model_file: Path | None = None) -> World:
        """Read the files. The cluster is by default the one that the scenario names. ConfigError or DataError."""
        scenario = load_scenario(scenario_file)
        cluster = load_cluster(cluster_file or cluster_of(scenario_file))
        scenario.check_against(cluster, str(scenario_file))
        features = load_model(model_file or _model_file(cluster), cluster.private_layers)
        return cls(cluster, features, with_traces(scenario, scenario_file.parent), scenario_file.parent)

    def arrivals(self, seed: int) -> list[Arrival]:
        """The workload of a seed: requests of traces, and drawn ones for the other classes."""
        return schedule_arrivals(self.cluster, self.scenario, seed, traced_requests(self.scenario, self.folder))

    def loop(self) -> Loop:
        """The control loop that suits the length of the scenario."""
        if self.scenario.duration <= _SHORT_S:
            return Loop(
                Settings(horizon_s=60.0, cooldown_s=6.0, trial_s=30.0, work_limit=_WORK_LIMIT),
                period_s=2.0,
                window_s=4.0,
            )
        return Loop(Settings(horizon_s=300.0, work_limit=_WORK_LIMIT), period_s=20.0, window_s=20.0, fit_s=100.0)


def run_policy(world: World, policy: str, seed: int) -> tuple[RunRecord, dict[str, Any]]:
    """Simulate one policy; returns the record of the run, and the JSON object about it."""
    begun_s = time.perf_counter()
    record = simulate(
        world.cluster,
        world.features,
        world.scenario,
        world.arrivals(seed),
        make_policy(policy),
        name=policy,
        seed=seed,
        loop=world.loop(),
    )
    power_w = {node.name: node.compute_w for node in world.cluster.nodes}
    found: dict[str, Any] = {
        "policy": policy,
        "scenario": world.scenario.name,
        "seed": seed,
        "simulated_s": world.scenario.duration,
        "wall_s": round(time.perf_counter() - begun_s, 3),
        "energy_j_per_request": energy_j_per_request(record, power_w),
        **asdict(summarise(record)),
    }
    return record, {name: _plain(value) for name, value in found.items()}


def simulate_command(
    scenario: Path, policy: str, seed: int, out: Path | None, cluster: Path | None, model: Path | None
) -> None:
    """Print one JSON object per policy on standard output, and save the tables of each run below `out`.

    A policy of one's own is looked for in the working directory too.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    world = World.load(scenario, cluster, model)
    for name in _policies(policy):
        record, found = run_policy(world, name, seed)
        if out is not None:
            record.save(out / name.replace(":", ".") if policy == "all" else out)
        typer.echo(json.dumps(found))


def _policies(policy: str) -> Sequence[str]:
    return tuple(POLICIES) if policy == "all" else (policy,)


def _model_file(cluster: ClusterConfig) -> Path:
    path = _MODELS / f"{DEFAULT_MODEL}-{cluster.weights}.yaml"
    if not path.exists():
        raise ConfigError(str(path), "there is no file of the model's sizes in this width; give --model FILE")
    return path


def _plain(value: Any) -> Any:
    """A value of the JSON object: rounded as in reports/metrics.json, null for NaN."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
