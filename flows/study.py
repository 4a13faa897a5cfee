"""Study: serve one workload with the static and with the adaptive policy; measure, track and report the runs."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog
from prefect import flow

from flows import STATE
from flows.adapt import adapt
from flows.command import run_command
from flows.params import Params, load_params
from flows.profile import profile
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, running
from resplit.cluster.supervision import supervised
from resplit.comparison import compare, comparison_text, summaries
from resplit.config import ClusterConfig, load_cluster
from resplit.cost import CostModel, block_timings, prediction_error
from resplit.decide import History
from resplit.files import write_atomically
from resplit.planner.best_effort import BestEffortPlan
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig, load_scenario
from resplit.workload import schedule_requests
from tasks.changes import reset
from tasks.deploy import deploy_plan
from tasks.measure import measure, serve_workload
from tasks.mlflow_store import default_uri, how_to_open
from tasks.package import obtain_model, package
from tasks.plan import load_configurations, plan, problem
from tasks.report import Extras, report
from tasks.track import close_study, open_study, publish_comparison, track_run
from tasks.workload import load_words

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
        first = plan(problem(client, cluster.config, cost, valid.telemetry, live, 1.0))
        records = serve_policies(cluster, client, params, scenario, cost, first)
    extras = Extras(
        model=model.name,
        dequantised="dequantised" in model.note,
        timings=block_timings(cost, valid.telemetry, live.features),
        prediction_error=prediction_error(cost),
        validation=valid,
    )
    return publish(records, params, cluster_config, state, reports, extras)


@contextlib.contextmanager
def supervised_cluster(params: Params, state: Path) -> Iterator[Cluster]:
    """The cluster of a study. Nodes that end are started again.

    The controller is not: the records of the study end with it, so the study ends with an error.
    """
    with running(params.cluster, state, params.model) as cluster, supervised(cluster, cluster.config.node_names):
        yield cluster


def inputs(params: Params) -> tuple[ClusterConfig, ScenarioConfig]:
    """Read the cluster and the scenario and check them against each other. ConfigError names the mismatch."""
    cluster, scenario = load_cluster(params.cluster), load_scenario(params.scenario)
    scenario.check_against(cluster, str(params.scenario))
    scenario.check_live(str(params.scenario))
    return cluster, scenario


def serve_policies(
    cluster: Cluster,
    client: ControlClient,
    params: Params,
    scenario: ScenarioConfig,
    cost: CostModel,
    first: BestEffortPlan,
) -> list[RunRecord]:
    """Serve the workload three times from the same plan: undisturbed, static and adaptive. Must be called in a flow."""
    # Real machines do not share their cores with the control loop, so it yields to the processes of the nodes.
    os.nice(10)
    shutil.rmtree(cluster.state / "configurations", ignore_errors=True)
    undisturbed = scenario.model_copy(update={"name": "undisturbed", "nodes": (), "links": (), "load": ()})
    runs = (("static", undisturbed), ("static", scenario), ("resplit", scenario))
    return [_serve(cluster, client, params, each, policy, cost, first) for policy, each in runs]


def _serve(
    cluster: Cluster,
    client: ControlClient,
    params: Params,
    scenario: ScenarioConfig,
    policy: str,
    cost: CostModel,
    first: BestEffortPlan,
) -> RunRecord:
    """Serve one run, starting with the cluster as declared and without a history of moves."""
    client.set_moves(History())
    write_atomically(cluster.state / "cost.json", cost.to_json())
    requests = schedule_requests(cluster.config, scenario, params.seed, load_words(params.prompts))
    first_record, decisions = len(client.records()), client.decisions()
    epoch = deploy_plan(client, first, client.model().epoch)
    _log.info("run begins", policy=policy, scenario=scenario.name, requests=len(requests), epoch=epoch)
    begun_s = time.time()
    serving = serve_workload.submit(cluster, client.model().name, requests, scenario)
    try:
        if policy == "resplit":
            loop = params.adapt
            adapt(cluster.url, cluster.state, loop.period_s, scenario.duration, loop.window_s, loop.settings(), begun_s)
        sent = serving.result()
    finally:
        client.arm_fast_loop(params.adapt.settings(), 0)
        reset(client, cluster, cluster.config, scenario)
    last_decision = decisions[-1].id if decisions else 0
    return measure(client, cluster.config, scenario, policy, params.seed, sent, first_record, last_decision)


def publish(
    records: Sequence[RunRecord], params: Params, cluster: ClusterConfig, state: Path, reports: Path, extras: Extras
) -> str:
    """Write the report, record every run in MLflow, and return the comparison as text."""
    rows = compare(summaries(list(records)))
    page = report(records, reports, extras)
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
    """`python -m flows.study`: the study of `params.yaml`."""

    def run() -> None:
        begun_s, params = time.monotonic(), load_params()
        inputs(params)  # an error in the files is reported before anything starts
        sys.stdout.write(f"{study(params)}\n")
        _log.info("study done", seconds=round(time.monotonic() - begun_s))

    run_command(run)


if __name__ == "__main__":
    main()
