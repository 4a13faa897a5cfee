"""Records studies in MLflow: one parent run per study, below it one run per policy and one per live configuration.

Knows MLflow; computes nothing that `resplit.metrics` does not. Only one process logs a study.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from resplit.comparison import Row, run_label
from resplit.errors import DataError
from resplit.metrics import epoch_latency, series, summarise
from resplit.records import RunRecord
from resplit.types import Weights, segments_of
from tasks import plots
from tasks.mlflow_views import OVER_TIME, POLICIES, saved_views, view_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Metric

BATCH = 1000  # the most metrics that MLflow takes in one call


@dataclass(frozen=True)
class Study:
    """A study's parent run, and where the runs below it go."""

    tracking_uri: str
    experiment_id: str
    run_id: str


def default_uri(state: Path) -> str:
    """The tracking store inside the project's state folder: an SQLite file, its artifacts beside it."""
    return f"sqlite:///{(state / 'mlflow' / 'mlflow.db').resolve()}"


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def open_study(tracking_uri: str, experiment: str, params: Mapping[str, object]) -> Study:
    """Start the parent run of a study with `params`, making store and experiment first where they are missing.

    `tracking_uri` is `sqlite:////absolute/file.db` or a server's `http://...`.
    """
    with _creating(tracking_uri) as artifacts:
        client = _client(tracking_uri)
        experiment_id = _experiment_id(client, experiment, artifacts)
    run = client.create_run(experiment_id, run_name="study", tags=_git_tags())
    _log(client, run.info.run_id, {"kind": "study", **params})
    return Study(tracking_uri, experiment_id, run.info.run_id)


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def track_run(
    study: Study,
    record: RunRecord,
    cluster: str,
    weights: Weights,
    artifacts: Mapping[int, Path] | None = None,
) -> str:
    """Record one run of one policy and each configuration that was live in it; returns the policy's MLflow run.

    `artifacts` gives, by epoch, a folder (problem, plan, telemetry) that is kept with its configuration. What was
    half recorded when something failed is deleted, so that a retry starts anew.
    """
    client = _client(study.tracking_uri)
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
        for epoch in epoch_latency(record).itertuples():
            kept = (artifacts or {}).get(epoch.epoch)
            _track_configuration(client, study, record, epoch, params, start_ms, kept, created)
        client.set_terminated(run_id, end_time=start_ms + int(record.duration_s * 1000))
    return run_id


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def drain_decisions(study: Study, run_id: str, decisions: list[dict[str, Any]]) -> None:
    """Write the whole decision log so far into a run: as JSON, as Parquet, and as a table that the UI shows."""
    _log_decisions(_client(study.tracking_uri), run_id, decisions)


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def close_study(study: Study, files: Path | None = None) -> None:
    """End the parent run, keep `files` (the report) with it, and save the views that compare its runs."""
    client = _client(study.tracking_uri)
    if files is not None:
        _log_folder(client, study.run_id, files, "report")
    children = client.search_runs([study.experiment_id], f"tags.`mlflow.parentRunId` = '{study.run_id}'")
    metrics = sorted({name for run in children for name in run.data.metrics})
    for key, value in saved_views(study.run_id, metrics, int(time.time() * 1000)).items():
        client.set_experiment_tag(study.experiment_id, key, value)
    client.set_terminated(study.run_id)


@task(retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def publish_comparison(rows: list[Row]) -> None:
    """Put the comparison where Prefect shows a flow's results."""
    table = [
        {"measure": row.measure.label, "unit": row.measure.unit}
        | {label: row.measure.text(value) for label, value in row.values.items()}
        for row in rows
    ]
    create_table_artifact(table=table, key="static-against-adaptive", description="Static against adaptive")


def view_url(study: Study, server: str = "http://127.0.0.1:5000", key: str = POLICIES) -> str:
    """The page that compares the policies of the study (or, by `key`, its configurations)."""
    served_by = study.tracking_uri.rstrip("/") if study.tracking_uri.startswith("http") else server
    return served_by + view_path(study.experiment_id, key)


def how_to_open(study: Study, port: int = 5000) -> str:
    """What to type and where to look, as text for a person."""
    url = view_url(study, f"http://127.0.0.1:{port}")
    if study.tracking_uri.startswith("http"):
        return f"Open {url}"
    return f"Run   {ui_command(study.tracking_uri, port)}\nOpen  {url}"


def ui_command(tracking_uri: str, port: int = 5000) -> str:
    """One shell command that serves the MLflow UI over a local store, without the parts that it does not need."""
    mlflow = shutil.which("mlflow", path=str(Path(sys.executable).parent)) or "mlflow"
    store = ["--backend-store-uri", tracking_uri, "--default-artifact-root", _artifact_root(tracking_uri)]
    where = ["--no-serve-artifacts", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false " + shlex.join([mlflow, "server", *store, *where])


def short_placement(placement: str) -> str:
    """A placement as `node[first-last]` segments in model order, from comma-separated node names."""
    return " ".join(f"{s.node}[{s.first}-{s.last}]" for s in segments_of(tuple(placement.split(","))))


def _client(tracking_uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri)


@contextlib.contextmanager
def _creating(tracking_uri: str) -> Iterator[str | None]:
    """Hold the only right to create a local store, and give the root of its artifacts; a server looks after itself.

    Two processes that use a fresh store at once would both create its tables, and one would die.
    """
    if not tracking_uri.startswith("sqlite:"):
        yield None
        return
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with (database.parent / "creating.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        yield _artifact_root(tracking_uri)


def _artifact_root(tracking_uri: str) -> str:
    return (Path(tracking_uri.removeprefix("sqlite:///")).parent / "artifacts").resolve().as_uri()


def _experiment_id(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException:
        # Another process was quicker: on a server nothing holds it back.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


@contextlib.contextmanager
def _all_or_none(client: MlflowClient) -> Iterator[list[str]]:
    """A list for the runs that the block creates; where it fails, they are deleted."""
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
    """A new run below the study, noted in `created`."""
    own = {
        "mlflow.parentRunId": study.run_id,
        "mlflow.runColor": plots.RUN_COLOURS.get(run_label(record), plots.OTHER_COLOUR),
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
    epoch: Any,  # a row of `epoch_latency`
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
    client.log_dict(run_id, {"placement": epoch.placement.split(",")}, "placement.json")
    live = (max(epoch.time_s, 0.0), min(epoch.until_s, record.duration_s))
    _log_figures(client, run_id, {"latency": plots.latency_figure({run_label(record): record}, live)})
    if artifacts is not None:
        _log_folder(client, run_id, artifacts)
    client.set_terminated(run_id, end_time=until_ms)


def _log_folder(client: MlflowClient, run_id: str, folder: Path, kept_as: str | None = None) -> None:
    # MLflow logs a folder that is not there as nothing, silently.
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; there is nothing to keep with the run")
    client.log_artifacts(run_id, str(folder), kept_as)


def _log_decisions(client: MlflowClient, run_id: str, decisions: list[dict[str, Any]]) -> None:
    if not decisions:
        return
    table = pd.DataFrame([{key: _cell(value) for key, value in decision.items()} for decision in decisions])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "decisions.json").write_text(json.dumps(decisions, indent=1, default=str), encoding="utf-8")
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
    return _metrics(asdict(summarise(record)), end_ms) + _points(record, start_ms, 0.0, record.duration_s)


def _points(record: RunRecord, start_ms: int, from_s: float, until_s: float) -> list[Metric]:
    """The run's series between two moments, one point per second, its step the second of the run."""
    over_time = series(record)
    live = over_time[(over_time.time_s > from_s) & (over_time.time_s <= until_s)]
    return [
        metric
        for point in live.itertuples()
        for metric in _metrics(
            {name: getattr(point, name.removeprefix("over_time/")) for name in OVER_TIME},
            start_ms + int(point.time_s * 1000),
            round(point.time_s),
        )
    ]


def _metrics(values: Mapping[str, float], at_ms: int, step: int = 0) -> list[Metric]:
    """What is known of `values`; a value that is not (NaN) is left out."""
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
            plots.save_png(figure, Path(folder) / f"{name}.png")
        client.log_artifacts(run_id, folder, "plots")


@functools.cache
def _git_tags() -> dict[str, str]:
    """The commit that the checkout stands on, and whether it has changes; nothing outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git.commit": commit.stdout.strip(), "git.dirty": str(bool(status.stdout.strip())).lower()}


def _cell(value: object) -> object:
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value, default=str)
