"""The whole study: all scenarios, all policies, several seeds. Runs that are complete are not repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog
from prefect import flow

from flows import STATE
from flows.params import Params, params_of_scenario
from flows.profile import profile
from flows.serving import Run, Serving, supervised_cluster, undisturbed, yield_to_nodes
from resplit.cluster.client import ControlClient
from resplit.comparison import SATURATED, UNDISTURBED, run_label
from resplit.config import load_cluster
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig, load_scenario
from resplit.traces import with_traces
from tasks.mlflow_store import default_uri
from tasks.package import obtain_model, package
from tasks.plan import load_configurations, plan, problem
from tasks.reality import replays_of
from tasks.report import Extras, write_report, write_study_metrics
from tasks.simulated_results import simulated_results
from tasks.study_records import StudyRecords, digest_of
from tasks.track import close_study, open_study, track_run

__all__ = ["LABELS", "live_scenarios", "main_all", "study_scenario", "with_plain_runs"]

LABELS = (UNDISTURBED, "static", "adaptive", "threshold", "clairvoyant", f"static-{SATURATED}", f"adaptive-{SATURATED}")
_POLICIES = {UNDISTURBED: "static", "adaptive": "resplit"}  # of the labels; other labels are the names of policies
_RECORDS = Path("data/generated/study")
_log = structlog.get_logger(__name__)


def live_scenarios(folder: Path) -> list[str]:
    """The names of the scenarios in `folder` that a cluster of processes can play."""
    return [path.stem for path in sorted(folder.glob("*.yaml")) if not load_scenario(path).simulated_only]


def with_plain_runs(labels: Sequence[str]) -> list[str]:
    """`labels`, with the plain run of each saturated one before it: the report shows both in the same row."""
    return list(dict.fromkeys(each for label in labels for each in (label.removesuffix(f"-{SATURATED}"), label)))


def study_scenario(
    name: str, params: Params, labels: Sequence[str], seeds: Sequence[int], state: Path, reports: Path
) -> Path:
    """Do the runs of one scenario that are not done yet, and write its report; returns the file with its metrics."""
    params, labels = params_of_scenario(params, name), with_plain_runs(labels)
    records = StudyRecords(_RECORDS / name / _digest(params))
    todo = [(label, seed) for seed in seeds for label in labels if not records.has(label, seed)]
    _log.info("scenario", scenario=name, runs=len(todo), done=len(seeds) * len(labels) - len(todo))
    if todo:
        _serve_missing(params, todo, records, state)
    return _report(records.load(), reports / name, params)


@flow(name="study of a scenario", validate_parameters=False)
def _serve_missing(params: Params, todo: Sequence[tuple[str, int]], records: StudyRecords, state: Path) -> None:
    """Serve the runs `todo` one after the other. Each is kept and tracked as soon as it is done."""
    config = load_cluster(params.cluster)
    scenario = with_traces(load_scenario(params.scenario), params.scenario.parent)
    package(obtain_model(params.model, state, config), state)
    about = {"model": params.model, "cluster": config.name, "scenario": scenario.name}
    tracked = open_study(os.environ.get("MLFLOW_TRACKING_URI") or default_uri(state), config.name, about)
    with supervised_cluster(params, state) as cluster, ControlClient(cluster.url, cluster.token) as client:
        valid, cost = profile(cluster.url, state)
        posed = problem(client, cluster.config, cost, valid.telemetry, client.model(), 1.0)
        serving = Serving(cluster, client, params, cost, posed, plan(posed))
        yield_to_nodes()
        for label, seed in todo:
            record = serving.serve(_run(label, seed, scenario))
            records.save(record)
            kept = load_configurations(state / "configurations", [int(epoch) for epoch in record.epochs.epoch])
            track_run(tracked, record, config.name, config.objective.values(), kept)
    close_study(tracked)


def _run(label: str, seed: int, scenario: ScenarioConfig) -> Run:
    policy, _, saturated = label.partition("-")
    played = undisturbed(scenario) if label == UNDISTURBED else scenario
    if saturated:
        played = played.model_copy(update={"name": SATURATED})
    return Run(_POLICIES.get(policy, policy), played, seed)


def _report(records: Sequence[RunRecord], folder: Path, params: Params) -> Path:
    """The page of the runs of the first seed, and the metrics over all seeds."""
    first = min(record.seed for record in records)
    simulated = simulated_results(folder.parent / "simulated" / "metrics.json")
    shown = [record for record in records if record.seed == first]
    replays = replays_of(shown, params.model, params.scenario, params.cluster)
    write_report(shown, folder, Extras(simulated=simulated, replays=replays))
    runs: dict[str, dict[int, RunRecord]] = {}
    for record in records:
        runs.setdefault(run_label(record), {})[record.seed] = record
    return write_study_metrics(runs, folder)


def _digest(params: Params) -> str:
    files = (params.cluster, params.scenario, params.prompts)
    return digest_of(files, params.model, params.adapt.model_dump_json())


def main_all(params: Params, names: Sequence[str], labels: Sequence[str], seeds: int) -> None:
    """The study of these scenarios over `seeds` seeds; prints the files with their metrics.

    Of several scenarios, each has a process of its own. It lowers its priority once its nodes run, and nodes that
    it started for the next scenario would have that priority, too.
    """
    if len(names) == 1:
        numbers = range(params.seed, params.seed + seeds)
        sys.stdout.write(f"{study_scenario(names[0], params, labels, numbers, STATE, Path('reports'))}\n")
        return
    for name in names:
        command = [sys.executable, "-m", "flows.study", "--all", "--seeds", str(seeds)]
        with subprocess.Popen([*command, "--scenarios", name, "--policies", *labels]) as study:
            try:
                status = study.wait()
            except KeyboardInterrupt:
                study.terminate()  # Ctrl-C reaches it anyway, a signal to this process alone does not
                raise
        if status:
            sys.exit(status)  # it has said why
