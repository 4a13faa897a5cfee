"""The study: one workload under the static plan and under the adaptive one, measured, tracked and reported."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import structlog
from prefect import flow

from flows import STATE
from flows.adapt import adapt
from flows.params import Params, load_params
from flows.profile import profile
from resplit.cli import log_to_stderr
from resplit.client import ControlClient
from resplit.config import ClusterConfig, ScenarioConfig, load_cluster, load_scenario
from resplit.cost import CostModel
from resplit.errors import ResplitError
from resplit.launch import Cluster, running
from resplit.measure import compare, comparison_text, summaries
from resplit.records import RunRecord
from resplit.start import Live, live_of
from resplit.telemetry import Telemetry
from resplit.types import Plan
from tasks.deploy import deploy_plan
from tasks.measure import measure, serve_workload
from tasks.package import obtain_model, package
from tasks.plan import plan, problem
from tasks.report import Extras, report
from tasks.track import Study, close_study, default_uri, how_to_open, open_study, publish_comparison, track_run
from tasks.workload import Arrival, load_words, reset, workload

REPORTS = Path("reports")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Started:
    """A running cluster with everything that its runs have in common: the plan of the start and what it came from."""

    cluster: Cluster
    client: ControlClient
    params: Params
    cost: CostModel
    plan: Plan
    telemetry: Telemetry
    live: Live
    words: list[str]


@flow(name="study", validate_parameters=False)
def study(params: Params, state: Path = STATE, reports: Path = REPORTS) -> str:
    """Run the whole loop and both policies; the comparison as text."""
    cluster_config, scenario = load_cluster(params.cluster), load_scenario(params.scenario)
    scenario.check_against(cluster_config, str(params.scenario))
    model = obtain_model(params.model, state, cluster_config)
    package(model, state)
    shutil.rmtree(state / "configurations", ignore_errors=True)
    _log.info("starting the cluster", nodes=len(cluster_config.nodes))
    with running(params.cluster, state, params.model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        valid, cost = profile(cluster.url, state)
        live = live_of(client)
        posed = problem(client, cluster.config, cost, valid.telemetry, live, 1.0)
        first = plan(posed)
        started = Started(cluster, client, params, cost, first, valid.telemetry, live, load_words(params.prompts))
        undisturbed = scenario.model_copy(update={"name": "undisturbed", "nodes": (), "links": (), "load": ()})
        records = [
            run(started, "static", undisturbed),
            run(started, "static", scenario),
            run(started, "resplit", scenario),
        ]
        timings = block_timings(cost, live, Telemetry.from_rows(client.telemetry(0.0)))
    extras = Extras(
        model=model.name,
        dequantised="dequantised" in model.note,
        timings=timings,
        prediction_error=errors_of(cost),
        validation=valid,
    )
    return publish(records, params, cluster_config, state, reports, extras)


def run(started: Started, policy: str, scenario: ScenarioConfig) -> RunRecord:
    """One run of the workload, from the plan of the start and the cluster as declared."""
    client, cluster, params = started.client, started.cluster, started.params
    arrivals: list[Arrival] = workload(cluster.config, scenario, params.seed, started.words)
    (cluster.state / "history.json").unlink(missing_ok=True)
    (cluster.state / "cost.json").write_text(started.cost.to_json(), encoding="utf-8")
    first_record, decisions = len(client.records()), client.decisions()
    epoch = deploy_plan(client, started.plan, client.model()["epoch"])
    _log.info("run begins", policy=policy, scenario=scenario.name, requests=len(arrivals), epoch=epoch)
    serving = serve_workload.submit(cluster.url, cluster.token, client.model()["name"], arrivals, scenario)
    try:
        if policy == "resplit":
            loop = params.adapt
            begun_s = time.time()
            adapt(cluster.url, cluster.state, loop.period_s, scenario.duration, loop.window_s, loop.settings(), begun_s)
        sent = serving.result()
    finally:
        reset(client, cluster.config, scenario)
    last_decision = decisions[-1]["id"] if decisions else 0
    return measure(client, cluster.config, scenario, policy, params.seed, sent, first_record, last_decision)


def publish(
    records: list[RunRecord], params: Params, cluster: ClusterConfig, state: Path, reports: Path, extras: Extras
) -> str:
    """Write the report, track every run in MLflow, and return the comparison as text."""
    rows = compare(summaries(records))
    page = report(records, reports, extras)
    tracked: Study = open_study(
        default_uri(state), cluster.name, {"model": params.model, "seed": params.seed, "scenario": params.scenario.stem}
    )
    for record in records:
        artifacts = {int(epoch): state / "configurations" / str(epoch) for epoch in record.epochs.epoch}
        kept = {epoch: folder for epoch, folder in artifacts.items() if folder.exists()}
        track_run(tracked, record, cluster.name, cluster.weights.values(), kept)
    close_study(tracked, reports)
    publish_comparison(rows)
    return f"\n{comparison_text(rows)}\n\nReport  {page}\n{how_to_open(tracked)}"


def block_timings(cost: CostModel, live: Live, telemetry: Telemetry) -> pd.DataFrame:
    """Predicted and measured seconds of passes, the median for each block, node and phase."""
    features = {block.name: block for block in live.features}
    rows = []
    for (node, block, phase), passes in telemetry.blocks.groupby(["node", "block", "phase"]):
        predicted = cost.pass_s(features[block], node, phase, passes.tokens, passes.context_tokens)
        ratio = (passes.seconds / predicted).median()
        typical = float(pd.Series(predicted).median())
        rows.append({"node": node, "phase": phase, "predicted_s": typical, "measured_s": typical * ratio})
    return pd.DataFrame(rows)


def errors_of(cost: CostModel) -> dict[str, float]:
    """Median relative prediction errors on what the fit has not seen."""
    held_out = {"unseen context lengths": cost.held_out_contexts, "unseen nodes": cost.held_out_nodes}
    return {name: error.median for name, error in held_out.items() if error.median is not None}


def main() -> None:
    """`python -m flows.study`: the study of `params.yaml`."""
    log_to_stderr()
    begun_s = time.monotonic()
    try:
        text = study(load_params())
    except ResplitError as error:
        sys.exit(f"resplit: {error}")
    sys.stdout.write(f"{text}\n")
    _log.info("study done", seconds=round(time.monotonic() - begun_s))


if __name__ == "__main__":
    main()
