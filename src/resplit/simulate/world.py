"""What is simulated: a cluster with a model, a scenario and its traces, read from files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from resplit.config import ClusterConfig, load_cluster
from resplit.decide import Settings
from resplit.errors import ConfigError
from resplit.model import DEFAULT_MODEL
from resplit.scenario import ScenarioConfig, cluster_of, load_scenario
from resplit.simulate.area import grown
from resplit.simulate.loop import Loop
from resplit.simulate.models import load_model
from resplit.traces import traced_requests, with_traces
from resplit.types import BlockFeatures
from resplit.workload import Arrival, schedule_arrivals

__all__ = ["World"]

_MODELS = Path("data/models")
# Solver steps of each plan, so that the same run gives the same plans. More would go into proofs of optimality.
_WORK_LIMIT = 60
_SHORT_S = 600.0  # shorter scenarios compress a day into minutes


@dataclass(frozen=True, eq=False)
class World:
    """What is simulated: a cluster with a model, and a scenario whose traces were read."""

    cluster: ClusterConfig
    features: tuple[BlockFeatures, ...]
    scenario: ScenarioConfig

    @classmethod
    def load(
        cls,
        scenario_file: Path,
        cluster_file: Path | None = None,
        model_file: Path | None = None,
        traces: Path | None = None,
    ) -> World:
        """Read the files. Cluster and model are by default those that the scenario names. ConfigError or DataError.

        `traces` is the folder of the trace files, if they are not where the scenario says.
        """
        scenario = load_scenario(scenario_file)
        cluster = load_cluster(cluster_file or cluster_of(scenario_file))
        scenario.check_against(cluster, str(scenario_file))
        if traces is not None:
            scenario = _moved(scenario, traces.resolve())
        if scenario.area is not None:
            cluster = grown(cluster, scenario.area, scenario_file.parent)
        named = Path(os.path.normpath(scenario_file.parent / scenario.model)) if scenario.model else None
        features = load_model(model_file or named or _model_file(cluster), cluster.private_layers)
        return cls(cluster, features, with_traces(scenario, scenario_file.parent))

    def arrivals(self, seed: int) -> list[Arrival]:
        """The workload of a seed: requests of traces, and drawn ones for the other classes."""
        return schedule_arrivals(self.cluster, self.scenario, seed, traced_requests(self.scenario, Path()))

    def loop(self) -> Loop:
        """The control loop that suits the length of the scenario."""
        if self.scenario.duration <= _SHORT_S:
            return Loop(
                Settings(horizon_s=60.0, cooldown_s=6.0, trial_s=30.0, work_limit=_WORK_LIMIT),
                period_s=3.0,
                window_s=20.0,
            )
        return Loop(Settings(horizon_s=300.0, work_limit=_WORK_LIMIT), period_s=20.0, window_s=20.0, fit_s=100.0)


def _moved(scenario: ScenarioConfig, folder: Path) -> ScenarioConfig:
    """The scenario with the trace files of the same names in `folder`."""

    def there(file: str) -> str:
        return str(folder / Path(file).name)

    traces = tuple(each.model_copy(update={"file": there(each.file)}) for each in scenario.traces)
    area = scenario.area
    if area is not None:
        area = area.model_copy(update={"positions": there(area.positions), "round_trips": there(area.round_trips)})
    return scenario.model_copy(update={"traces": traces, "area": area})


def _model_file(cluster: ClusterConfig) -> Path:
    path = _MODELS / f"{DEFAULT_MODEL}-{cluster.weights}.yaml"
    if not path.exists():
        raise ConfigError(str(path), "there is no file of the model's sizes in this width; give --model FILE")
    return path
