"""Study: serve one workload with the static and with the adaptive policy; measure, track and report the runs."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog
from prefect import flow

from flows import STATE
from flows.command import run_command
from flows.params import SCENARIOS, Params, load_params
from flows.profile import profile
from flows.serving import Run, Serving, supervised_cluster, undisturbed, yield_to_nodes
from flows.study_all import LABELS, live_scenarios, main_all
from resplit.cluster.client import ControlClient
from resplit.comparison import compare, comparison_text, summaries
from resplit.config import ClusterConfig, load_cluster
from resplit.cost import block_timings, prediction_error
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig, load_scenario
from resplit.traces import with_traces
from tasks.mlflow_store import default_uri, how_to_open
from tasks.package import obtain_model, package
from tasks.plan import load_configurations, plan, problem
from tasks.reality import replays_of
from tasks.report import Extras, report
from tasks.simulated_results import simulated_results
from tasks.track import close_study, open_study, publish_comparison, track_run

REPORTS = Path("reports")
_log = structlog.get_logger(__name__)


@flow(name="study", validate_parameters=False)
def study(params: Params | None = None, state: Path = STATE, reports: Path = REPORTS) -> str:
    """Plan, and serve the workload under each policy of `params` (default: `params.yaml`); returns the comparison."""
    params = params or load_params()
    cluster_config, scenario = inputs(params)
    model = obtain_model(params.model, state, cluster_config)
    package(model, state)
    with supervised_cluster(params, state) as cluster, ControlClient(cluster.url, cluster.token) as client:
        valid, cost = profile(cluster.url, state)
        live = client.model()
        posed = problem(client, cluster.config, cost, valid.telemetry, live, 1.0)
        records = serve_policies(Serving(cluster, client, params, cost, posed, plan(posed)), scenario)
    extras = Extras(
        model=model.name,
        dequantised="dequantised" in model.note,
        timings=block_timings(cost, valid.telemetry, live.features),
        prediction_error=prediction_error(cost),
        validation=valid,
    )
    return publish(records, params, cluster_config, state, reports, extras)


def inputs(params: Params) -> tuple[ClusterConfig, ScenarioConfig]:
    """Read the cluster and the scenario and check them against each other. ConfigError names the mismatch."""
    cluster, scenario = load_cluster(params.cluster), load_scenario(params.scenario)
    scenario.check_against(cluster, str(params.scenario))
    scenario.check_live(str(params.scenario))
    return cluster, with_traces(scenario, params.scenario.parent)


def serve_policies(serving: Serving, scenario: ScenarioConfig) -> list[RunRecord]:
    """Serve the workload three times from the same plan: undisturbed, static and adaptive. Must be called in a flow."""
    shutil.rmtree(serving.cluster.state / "configurations", ignore_errors=True)
    yield_to_nodes()
    seed = serving.params.seed
    runs = [Run("static", undisturbed(scenario), seed), Run("static", scenario, seed), Run("resplit", scenario, seed)]
    return [serving.serve(run) for run in runs]


def publish(
    records: Sequence[RunRecord], params: Params, cluster: ClusterConfig, state: Path, reports: Path, extras: Extras
) -> str:
    """Write the report, record every run in MLflow, and return the comparison as text."""
    rows = compare(summaries(list(records)))
    simulated = simulated_results(reports / "simulated" / "metrics.json")
    replays = replays_of(records, params.model, params.scenario, params.cluster)
    page = report(records, reports, replace(extras, simulated=simulated, replays=replays))
    about = {"model": params.model, "cluster": cluster.name, "scenario": params.scenario.stem, "seed": params.seed}
    errors = {
        f"prediction error {what.replace(',', '')}": f"{error:.4f}" for what, error in extras.prediction_error.items()
    }
    tracked = open_study(os.environ.get("MLFLOW_TRACKING_URI") or default_uri(state), cluster.name, about | errors)
    for record in records:
        kept = load_configurations(state / "configurations", [int(epoch) for epoch in record.epochs.epoch])
        track_run(tracked, record, cluster.name, cluster.objective.values(), kept)
    close_study(tracked, reports)
    publish_comparison(rows)
    return f"\n{comparison_text(rows)}\n\nReport  {page}\n{how_to_open(tracked)}"


def main() -> None:
    """`python -m flows.study`: the study of `params.yaml`, or with --all that of all scenarios, policies and seeds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--all", action="store_true", help="all scenarios and policies over several seeds; resumes")
    parser.add_argument("--scenarios", nargs="+", metavar="NAME", help="with --all: only these")
    parser.add_argument("--policies", nargs="+", choices=LABELS, default=LABELS, help="with --all: only these")
    parser.add_argument("--seeds", type=int, default=3, help="with --all: how many (default: %(default)s)")
    given = parser.parse_args()

    def run() -> None:
        begun_s, params = time.monotonic(), load_params()
        if given.all:
            main_all(params, given.scenarios or live_scenarios(SCENARIOS), given.policies, given.seeds)
        else:
            inputs(params)  # an error in the files is reported before anything starts
            sys.stdout.write(f"{study(params)}\n")
        _log.info("study done", seconds=round(time.monotonic() - begun_s))

    run_command(run)


if __name__ == "__main__":
    main()
