"""The parameters of a study: `params.yaml`, parsed once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resplit.decide import Settings
from resplit.errors import ConfigError
from resplit.scenario import cluster_of

PARAMS, SCENARIOS = Path("params.yaml"), Path("data/scenarios")


class AdaptParams(BaseModel):
    """The control loop: its period, its window of telemetry, and the settings of its decisions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    period_s: float
    window_s: float
    horizon_s: float
    cooldown_s: float
    trial_s: float
    threshold: float

    def settings(self) -> Settings:
        """The settings of the decisions."""
        return Settings(
            horizon_s=self.horizon_s, cooldown_s=self.cooldown_s, trial_s=self.trial_s, threshold=self.threshold
        )


class SimulatedParams(BaseModel):
    """The simulated study: what is simulated, and on what. `seeds` counts from `first_seed`.

    Among the policies, "all" and "ablations" stand for groups of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenarios: tuple[str, ...]
    policies: tuple[str, ...]
    first_seed: Annotated[int, Field(ge=0)]
    seeds: Annotated[int, Field(ge=1)]
    runner: Literal["processes", "dask", "ray"]
    workers: Annotated[int, Field(ge=1)]


class LearnedParams(BaseModel):
    """What the policy `learned` is trained on; other scenarios and seeds than those that it is judged on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenarios: tuple[str, ...]
    first_seed: Annotated[int, Field(ge=0)]
    seeds: Annotated[int, Field(ge=1)]


class Params(BaseModel):
    """The parameters of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    cluster: Path
    scenario: Path
    prompts: Path
    seed: int
    adapt: AdaptParams
    simulated: SimulatedParams
    learned: LearnedParams


def load_params(path: Path = PARAMS) -> Params:
    """Read `params.yaml`. ConfigError names the key and the rule.

    The environment variable MODEL overrides `model`; SCENARIO names a scenario that replaces scenario and cluster.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if os.environ.get("MODEL"):
            content["model"] = os.environ["MODEL"]
        params = Params.model_validate(content)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}", first["msg"]) from None
    return params_of_scenario(params, os.environ["SCENARIO"]) if os.environ.get("SCENARIO") else params


def params_of_scenario(params: Params, name: str) -> Params:
    """The same parameters for another scenario and its cluster; ConfigError if there is no such scenario."""
    scenario = SCENARIOS / f"{name}.yaml"
    if not scenario.exists():
        known = ", ".join(sorted(path.stem for path in SCENARIOS.glob("*.yaml")))
        raise ConfigError("SCENARIO", f"{name!r} is not one of {known}")
    return params.model_copy(update={"scenario": scenario, "cluster": cluster_of(scenario)})
