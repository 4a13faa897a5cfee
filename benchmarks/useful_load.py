"""The useful load of a scenario: how much of it can be offered while enough objectives are met.

    python -m benchmarks.useful_load [--scenario home-day] [--seeds 5] [--live]

Offers fixed multiples of the scenario's load, declared and changed, to the policies static and resplit. The useful load
of a policy is the highest point of the grid up to which, on average over the seeds, 95 % of all offered requests meet
their objective. In the simulator it takes some minutes. With --live, running clusters of emulated nodes serve the
loads: five minutes for each point and seed on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from resplit.config import load_cluster
from resplit.errors import ConfigError
from resplit.metrics import summarise
from resplit.scenario import cluster_of, load_scenario
from resplit.simulate.command import run_policy
from resplit.simulate.world import World

SCENARIOS = Path("data/scenarios")
POLICIES = ("static", "resplit")
GRID = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # multiples of the scenario's load
ENOUGH = 0.95  # of all offered requests meet their objective
Met = Callable[[float, int], Mapping[str, float]]  # the share by policy, at a multiple of the load and with a seed


def scaled_files(scenario_file: Path, factor: float, folder: Path) -> Path:
    """Write the scenario and its cluster with `factor` times the load to `folder`; returns the scenario's file."""
    cluster_file = cluster_of(scenario_file)
    cluster, scenario = _read(cluster_file), _read(scenario_file)
    if scenario.get("traces"):
        raise ConfigError(f"{scenario_file}: traces", "requests of a trace cannot be scaled; name a scenario without")
    for change in (*cluster["classes"], *scenario.get("load", ())):
        change["rate_rps"] *= factor
    scenario["cluster"] = cluster_file.name
    for name, content in ((cluster_file.name, cluster), (scenario_file.name, scenario)):
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / scenario_file.name


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def simulated(scenario_file: Path) -> Met:
    """Met objectives in the simulator."""

    def met(factor: float, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            scaled = scaled_files(scenario_file, factor, Path(folder))
            world = World.load(scaled, model_file=_model_file(scenario_file))
        return {policy: run_policy(world, policy, seed)[1].metrics.qos_met for policy in POLICIES}

    return met


def _model_file(scenario_file: Path) -> Path | None:
    named = load_scenario(scenario_file).model
    return (scenario_file.parent / named).resolve() if named else None


def live(scenario_file: Path) -> Met:
    """Met objectives on running clusters."""
    from flows.environment import prepare

    prepare()
    from prefect import flow

    from flows import STATE
    from flows.params import Params, load_params
    from flows.profile import profile
    from flows.serving import Run, Serving, supervised_cluster
    from resplit.cluster.client import ControlClient
    from tasks.package import obtain_model, package
    from tasks.plan import plan, problem

    @flow(name="useful load", validate_parameters=False)
    def served(params: Params, scenario: Path, seed: int) -> dict[str, float]:
        package(obtain_model(params.model, STATE, load_cluster(params.cluster)), STATE)
        with supervised_cluster(params, STATE) as cluster, ControlClient(cluster.url, cluster.token) as client:
            valid, cost = profile(cluster.url, STATE)
            posed = problem(client, cluster.config, cost, valid.telemetry, client.model(), 1.0)
            serving = Serving(cluster, client, params, cost, posed, plan(posed))
            runs = {policy: serving.serve(Run(policy, load_scenario(scenario), seed)) for policy in POLICIES}
            return {policy: summarise(record).qos_met for policy, record in runs.items()}

    def met(factor: float, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            scaled = scaled_files(scenario_file, factor, Path(folder))
            params = load_params().model_copy(update={"scenario": scaled, "cluster": cluster_of(scaled)})
            return served(params, scaled, seed)

    return met


def useful(shares: Mapping[float, float]) -> float | None:
    """The highest multiple up to which every share is enough; None if already the lowest one is not."""
    found = None
    for factor in sorted(shares):
        if shares[factor] < ENOUGH:
            break
        found = factor
    return found


def measured(met: Met, grid: Sequence[float], seeds: Iterable[int]) -> dict[str, dict[float, float]]:
    """The mean share of met objectives by policy and multiple of the load; prints a row for each multiple."""
    shares: dict[str, dict[float, float]] = {policy: {} for policy in POLICIES}
    seeds = list(seeds)
    sys.stdout.write(f"| times the load | {' | '.join(POLICIES)} |\n{'| --- ' * (1 + len(POLICIES))}|\n")
    for factor in grid:
        found = [met(factor, seed) for seed in seeds]
        for policy in POLICIES:
            shares[policy][factor] = mean(each[policy] for each in found)
        cells = " | ".join(f"{shares[policy][factor]:.1%}" for policy in POLICIES)
        sys.stdout.write(f"| {factor:g} | {cells} |\n")
        sys.stdout.flush()
    return shares


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="home-day", help="of data/scenarios (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 7 on (default: %(default)s)")
    parser.add_argument("--live", action="store_true", help="on running clusters, not in the simulator")
    given = parser.parse_args()
    scenario_file = SCENARIOS / f"{given.scenario}.yaml"
    met = live(scenario_file) if given.live else simulated(scenario_file)
    shares = measured(met, GRID, range(7, 7 + given.seeds))
    for policy in POLICIES:
        factor = useful(shares[policy])
        words = f"{factor:g} times the load" if factor else f"none: below {ENOUGH:.0%} at {GRID[0]:g} times the load"
        sys.stdout.write(f"\nuseful load of {policy}: {words}\n")


if __name__ == "__main__":
    main()
