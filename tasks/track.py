"""Track: record studies in MLflow.

A study is one parent run, with one run below it for each policy and one for each configuration that was live. Only one
process may record a study.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from resplit.comparison import Row, run_label
from resplit.decide import Decision
from resplit.errors import DataError
from resplit.metrics import MeasuredEpoch, measured_epochs, series, summarise
from resplit.records import RunRecord
from resplit.simulate.result import SimulatedResult
from resplit.types import Weights, segments_of
from tasks import plot_style, plots
from tasks.mlflow_store import Study, client_of, creating, experiment_id
from tasks.mlflow_views import OVER_TIME, saved_views, simulated_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Metric

BATCH = 1000  # the most metrics that MLflow accepts in one call


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def open_study(tracking_uri: str, experiment: str, params: Mapping[str, object]) -> Study:
    """Start the parent run of a study with `params`, after creating the store and the experiment if necessary.

    `tracking_uri` is `sqlite:////absolute/file.db` or a server's `http://...`.
    """
    with creating(tracking_uri) as artifacts:
        client = client_of(tracking_uri)
        experiment_of_study = experiment_id(client, experiment, artifacts)
    run = client.create_run(experiment_of_study, run_name="study", tags=_git_tags())
    _log(client, run.info.run_id, {"kind": "study", **params})
    return Study(tracking_uri, experiment_of_study, run.info.run_id)


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def track_run(
    study: Study,
    record: RunRecord,
    cluster: str,
    weights: Weights,
    artifacts: Mapping[int, Path] | None = None,
) -> str:
    """Record one run of one policy and each configuration that was live in it; returns the id of the policy's run.

    `artifacts` gives, by epoch, a folder (problem, plan, telemetry) that is kept with its configuration. After an
    error all runs created here are deleted, so that a retry starts from nothing.
    """
    client = client_of(study.tracking_uri)
    start_ms = int((time.time() - record.duration_s) * 1000)
    params = _params(record, cluster, weights)
    with _all_or_none(client) as created:
        run_id = _start(client, study, run_label(record), record, start_ms, created)
        _log(client, run_id, {"kind": "policy", **params}, _policy_metrics(record, start_ms))
        _log_decisions(client, run_id, record.decisions)
        _log_figures(client, run_id, plots.figures({run_label(record): record}))
        with tempfile.TemporaryDirectory() as folder:
            record.save(Path(folder))
            client.log_artifacts(run_id, folder, "record")
        for epoch in measured_epochs(record):
            kept = (artifacts or {}).get(epoch.epoch)
            _track_configuration(client, study, record, epoch, params, start_ms, kept, created)
        client.set_terminated(run_id, end_time=start_ms + int(record.duration_s * 1000))
    return run_id


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def track_simulated(study: Study, result: SimulatedResult, record: RunRecord) -> str:
    """Record one simulated run, its figures and their course; returns its id.

    Its times begin at the start of the workload, as if it had been played until now.
    """
    client, found, alike = client_of(study.tracking_uri), result.to_json(), ("policy", "scenario", "seed")
    name = " ".join(str(found[key]) for key in alike)
    start_ms = int((time.time() - record.duration_s) * 1000)
    end_ms = start_ms + int(record.duration_s * 1000)
    run = client.create_run(study.experiment_id, start_ms, {"mlflow.parentRunId": study.run_id}, run_name=name)
    values = {key: value for key, value in found.items() if key not in alike and isinstance(value, int | float)}
    params = {key: found[key] for key in alike}
    metrics = _metrics(values, end_ms) + _points(record, start_ms, 0.0, record.duration_s)
    _log(client, run.info.run_id, {"kind": "simulated", **params}, metrics)
    client.set_terminated(run.info.run_id, end_time=end_ms)
    return str(run.info.run_id)


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def close_study(study: Study, files: Path | None = None) -> None:
    """End the parent run, store `files` (the report) with it, and save the views that compare its runs."""
    client = client_of(study.tracking_uri)
    if files is not None:
        _log_folder(client, study.run_id, files, "report")
    children = client.search_runs([study.experiment_id], f"tags.`mlflow.parentRunId` = '{study.run_id}'")
    metrics = sorted({name for run in children for name in run.data.metrics})
    views = simulated_view if any(run.data.params.get("kind") == "simulated" for run in children) else saved_views
    for key, value in views(study.run_id, metrics, int(time.time() * 1000)).items():
        client.set_experiment_tag(study.experiment_id, key, value)
    client.set_terminated(study.run_id)


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def publish_comparison(rows: list[Row]) -> None:
    """Publish the comparison as an artifact of the flow run in Prefect."""
    table = [
        {"measure": row.measure.label, "unit": row.measure.unit}
        | {label: row.measure.text(value) for label, value in row.values.items()}
        for row in rows
    ]
    create_table_artifact(table=table, key="static-against-adaptive", description="Static against adaptive")


def short_placement(placement: tuple[str, ...]) -> str:
    """A placement as segments `node[first-last]` in model order."""
    return " ".join(f"{s.node}[{s.first}-{s.last}]" for s in segments_of(placement))


@contextlib.contextmanager
def _all_or_none(client: MlflowClient) -> Iterator[list[str]]:
    """Yields a list for the runs that the block creates. If the block fails, they are deleted."""
    created: list[str] = []
    try:
        yield created
    except BaseException:
        for run_id in created:
            client.delete_run(run_id)
        raise


def _start(
    client: MlflowClient, study: Study, name: str, record: RunRecord, start_ms: int, created: list[str], **tags: str
) -> str:
    """Create a run below the study, and add it to `created`."""
    own = {
        "mlflow.parentRunId": study.run_id,
        "mlflow.runColor": plot_style.run_colour(run_label(record)),
        "policy": record.policy,
        "scenario": record.scenario,
    }
    run = client.create_run(study.experiment_id, start_ms, own | _git_tags() | tags, run_name=name)
    created.append(run.info.run_id)
    return str(run.info.run_id)


def _track_configuration(
    client: MlflowClient,
    study: Study,
    record: RunRecord,
    epoch: MeasuredEpoch,
    params: Mapping[str, object],
    start_ms: int,
    artifacts: Path | None,
    created: list[str],
) -> None:
    name = f"{run_label(record)}, epoch {epoch.epoch:02d} ({epoch.action})"
    from_ms, until_ms = (start_ms + int(moment_s * 1000) for moment_s in (epoch.time_s, epoch.until_s))
    run_id = _start(client, study, name, record, from_ms, created, epoch=str(epoch.epoch))
    placed = {"epoch": epoch.epoch, "action": epoch.action, "placement": short_placement(epoch.placement)}
    metrics = _points(record, start_ms, epoch.time_s, epoch.until_s)
    known = ("predicted_latency_s", "measured_latency_s", "lower_bound", "moved_bytes", "pause_s", "requests")
    metrics += _metrics({key: float(getattr(epoch, key)) for key in known}, until_ms)
    _log(client, run_id, {"kind": "configuration", **params, **placed}, metrics)
    client.log_dict(run_id, {"placement": list(epoch.placement)}, "placement.json")
    live = (max(epoch.time_s, 0.0), min(epoch.until_s, record.duration_s))
    _log_figures(client, run_id, {"latency": plots.latency_figure({run_label(record): record}, live)})
    if artifacts is not None:
        _log_folder(client, run_id, artifacts)
    client.set_terminated(run_id, end_time=until_ms)


def _log_folder(client: MlflowClient, run_id: str, folder: Path, kept_as: str | None = None) -> None:
    # MLflow ignores a folder that does not exist.
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder, so it cannot be stored with the run")
    client.log_artifacts(run_id, str(folder), kept_as)


def _log_decisions(client: MlflowClient, run_id: str, decisions: Sequence[Decision]) -> None:
    if not decisions:
        return
    entries = [decision.to_json() for decision in decisions]
    table = pd.DataFrame([{key: _cell(value) for key, value in entry.items()} for entry in entries])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "decisions.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
        table.to_parquet(Path(folder) / "decisions.parquet", index=False)
        table.to_json(Path(folder) / "table.json", orient="split", index=False)
        client.log_artifacts(run_id, folder, "decisions")
    shown = [{"path": "decisions/table.json", "type": "table"}]
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(shown))


def _params(record: RunRecord, cluster: str, weights: Weights) -> dict[str, object]:
    alike = {"cluster": cluster, "policy": record.policy, "scenario": record.scenario, "seed": record.seed}
    return alike | {"weights": " ".join(f"{name}={value:g}" for name, value in asdict(weights).items())}


def _policy_metrics(record: RunRecord, start_ms: int) -> list[Metric]:
    end_ms = start_ms + int(record.duration_s * 1000)
    values = asdict(summarise(record)) | record.estimate_errors
    return _metrics(values, end_ms) + _points(record, start_ms, 0.0, record.duration_s)


def _points(record: RunRecord, start_ms: int, from_s: float, until_s: float) -> list[Metric]:
    """The series of the run between two times, one point for each second; the step is the second of the run."""
    over_time = series(record)
    live = over_time[(over_time.time_s > from_s) & (over_time.time_s <= until_s)]
    return [
        metric
        for point in live.to_dict("records")
        for metric in _metrics(
            {name: point[name.removeprefix("over_time/")] for name in OVER_TIME},
            start_ms + int(point["time_s"] * 1000),
            round(point["time_s"]),
        )
    ]


def _metrics(values: Mapping[str, float], at_ms: int, step: int = 0) -> list[Metric]:
    """MLflow metrics of `values`, without those that are NaN or infinite."""
    from mlflow.entities import Metric

    return [Metric(name, float(value), at_ms, step) for name, value in values.items() if math.isfinite(value)]


def _log(client: MlflowClient, run_id: str, params: Mapping[str, object], metrics: list[Metric] | None = None) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])
    for start in range(0, len(metrics or []), BATCH):
        client.log_batch(run_id, metrics=(metrics or [])[start : start + BATCH])


def _log_figures(client: MlflowClient, run_id: str, figures: Mapping[str, Figure]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in figures.items():
            plot_style.save_png(figure, Path(folder) / f"{name}.png")
        client.log_artifacts(run_id, folder, "plots")


@functools.cache
def _git_tags() -> dict[str, str]:
    """The commit of the checkout, and whether there are changes to it; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git.commit": commit.stdout.strip(), "git.dirty": str(bool(status.stdout.strip())).lower()}


def _cell(value: object) -> object:
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
