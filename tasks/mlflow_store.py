"""The tracking store of MLflow: where it is, how it is made, and how a person opens it."""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.mlflow_views import POLICIES, view_path

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Study:
    """The parent run of a study, and the experiment and store of the runs below it."""

    tracking_uri: str
    experiment_id: str
    run_id: str


def default_uri(state: Path) -> str:
    """The tracking store in a state folder: an SQLite file, with its artifacts beside it."""
    return f"sqlite:///{(state / 'mlflow' / 'mlflow.db').resolve()}"


def view_url(study: Study, server: str = "http://127.0.0.1:5000", key: str = POLICIES) -> str:
    """The address of the page that compares the policies of a study; `key` selects another saved view."""
    served_by = study.tracking_uri.rstrip("/") if study.tracking_uri.startswith("http") else server
    return served_by + view_path(study.experiment_id, key)


def how_to_open(study: Study, port: int = 5000) -> str:
    """How to open the study in a browser, as text for people."""
    url = view_url(study, f"http://127.0.0.1:{port}")
    if study.tracking_uri.startswith("http"):
        return f"Open {url}"
    return f"Run   {ui_command(study.tracking_uri, port)}\nOpen  {url}"


def ui_command(tracking_uri: str, port: int = 5000) -> str:
    """The shell command that serves the MLflow UI for a local store, without job execution and artifact proxy."""
    mlflow = shutil.which("mlflow", path=str(Path(sys.executable).parent)) or "mlflow"
    store = ["--backend-store-uri", tracking_uri, "--default-artifact-root", artifact_root(tracking_uri)]
    where = ["--no-serve-artifacts", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false " + shlex.join([mlflow, "server", *store, *where])


def client_of(tracking_uri: str) -> MlflowClient:
    """A client of the store. MLflow is imported here, because the import takes seconds."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri)


@contextlib.contextmanager
def creating(tracking_uri: str) -> Iterator[str | None]:
    """Hold the lock under which a local store may be created; yields the root of its artifacts, None for a server.

    Without the lock, two processes that use a new store at once would both create its tables, and one would fail.
    """
    if not tracking_uri.startswith("sqlite:"):
        yield None
        return
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with (database.parent / "creating.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            _create(database)
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        yield artifact_root(tracking_uri)


def _create(database: Path) -> None:
    """Make MLflow's tables in one step: half of them, after an interruption or on a full disk, cannot be completed."""
    partial = database.with_name("creating.db")
    for rest in database.parent.glob(f"{partial.name}*"):
        rest.unlink()
    client_of(f"sqlite:///{partial}").search_experiments()
    partial.rename(database)


def artifact_root(tracking_uri: str) -> str:
    """The folder of a local store's artifacts, as a URI."""
    return (Path(tracking_uri.removeprefix("sqlite:///")).parent / "artifacts").resolve().as_uri()


def experiment_id(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The id of the experiment called `name`, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException:
        # Another process created it meanwhile: on a server no lock prevents that.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
