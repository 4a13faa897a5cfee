"""Studies in MLflow."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from resplit.errors import DataError
from resplit.metrics import summarise
from resplit.simulate.result import SimulatedResult
from resplit.types import Weights
from tasks import mlflow_store, track
from tasks.mlflow_views import CONFIGURATIONS, POLICIES, TAG_PREFIX
from tests.support.runs import synthetic_run

STATIC, ADAPTIVE = synthetic_run("static", duration_s=40.0), synthetic_run("resplit", duration_s=40.0)
WEIGHTS = Weights(latency=1.0, balance=0.5)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables: creating them takes seconds, copying the file does not."""
    folder = tmp_path_factory.mktemp("store")
    MlflowClient(mlflow_store.default_uri(folder).replace("/mlflow/mlflow.db", "/empty.db")).search_experiments()
    return folder / "empty.db"


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path) -> str:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(empty_store, tmp_path / "mlflow" / "mlflow.db")
    return mlflow_store.default_uri(tmp_path)


@pytest.fixture
def study(uri: str) -> mlflow_store.Study:
    return track.open_study.fn(uri, "resplit", {"cluster": "home", "seed": 0})


def open_study(uri: str) -> mlflow_store.Study:
    return track.open_study.fn(uri, "resplit", {})


def below(study: mlflow_store.Study, kind: str) -> list[Run]:
    client = MlflowClient(study.tracking_uri)
    under = f"tags.`mlflow.parentRunId` = '{study.run_id}' and params.kind = '{kind}'"
    return client.search_runs([study.experiment_id], under, order_by=["tags.`mlflow.runName`"])


def test_a_policy_is_one_run_below_its_study_with_all_metrics(study: mlflow_store.Study) -> None:
    track.track_run.fn(study, STATIC, "home", WEIGHTS)
    (run,) = below(study, "policy")
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "kind": "policy",
        "cluster": "home",
        "policy": "static",
        "scenario": "a-day-at-home",
        "seed": "0",
        "weights": "latency=1 balance=0.5 privacy=0 energy=0",
    }
    assert run.data.tags["policy"] == "static"
    assert len(run.data.tags["git.commit"]) == 40
    assert run.data.metrics["latency_p95_s"] == pytest.approx(summarise(STATIC).latency_p95_s)
    assert run.data.metrics["estimate_error_speed"] == 0.021
    assert "pause_max_s" not in run.data.metrics, "there was no reconfiguration, so there is no pause"


def test_each_configuration_that_was_live_is_a_run_of_its_own(study: mlflow_store.Study) -> None:
    track.track_run.fn(study, ADAPTIVE, "home", WEIGHTS)
    runs = below(study, "configuration")
    assert [run.data.params["epoch"] for run in runs] == ["1", "2", "3", "4"]
    assert [run.data.tags["policy"] for run in runs] == ["resplit"] * 4
    assert runs[0].data.params["placement"] == "hub[0-4] desk[5-24] phone[25-30] hub[31-31]"
    assert runs[1].data.metrics["moved_bytes"] == ADAPTIVE.epochs.moved_bytes[1]


def test_series_have_one_point_for_each_second_in_which_a_configuration_was_live(study: mlflow_store.Study) -> None:
    track.track_run.fn(study, ADAPTIVE, "home", WEIGHTS)
    client = MlflowClient(study.tracking_uri)
    (policy,) = below(study, "policy")
    whole = client.get_metric_history(policy.info.run_id, "over_time/utilization")
    assert [point.step for point in whole] == list(range(1, 41))
    parts = [
        client.get_metric_history(run.info.run_id, "over_time/utilization") for run in below(study, "configuration")
    ]
    starts = ADAPTIVE.epochs.time_s.tolist()
    assert [min(point.step for point in part) >= start for part, start in zip(parts, starts, strict=True)] == [True] * 4
    assert sorted(point.step for part in parts for point in part) == list(range(1, 41))


def test_artifacts_of_an_epoch_are_kept_with_its_configuration(study: mlflow_store.Study, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "problem.json").write_text("{}")
    track.track_run.fn(study, ADAPTIVE, "home", WEIGHTS, {2: tmp_path / "two"})
    client = MlflowClient(study.tracking_uri)
    kept = [{file.path for file in client.list_artifacts(run.info.run_id)} for run in below(study, "configuration")]
    assert ["problem.json" in files for files in kept] == [False, True, False, False]
    figure = client.list_artifacts(below(study, "configuration")[0].info.run_id, "plots")
    assert [file.path for file in figure] == ["plots/latency.png"]
    (policy,) = below(study, "policy")
    figures = {file.path for file in client.list_artifacts(policy.info.run_id, "plots")}
    assert {"plots/latency.png", "plots/placement.png"} <= figures


def test_a_record_that_fails_leaves_no_runs_behind(study: mlflow_store.Study, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing: is not a folder"):
        track.track_run.fn(study, ADAPTIVE, "home", WEIGHTS, {3: tmp_path / "missing"})
    track.track_run.fn(study, ADAPTIVE, "home", WEIGHTS)
    assert len(below(study, "policy")) == 1
    assert len(below(study, "configuration")) == 4
    deleted = MlflowClient(study.tracking_uri).search_runs([study.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert deleted, "the runs created before the error are deleted"


def test_the_decisions_of_a_run_are_kept_with_it_and_shown_as_a_table(
    study: mlflow_store.Study, tmp_path: Path
) -> None:
    run_id = track.track_run.fn(study, ADAPTIVE, "home", WEIGHTS)
    folder = Path(MlflowClient(study.tracking_uri).download_artifacts(run_id, "decisions", str(tmp_path)))
    decisions = ADAPTIVE.decisions
    assert json.loads((folder / "decisions.json").read_text()) == [decision.to_json() for decision in decisions]
    assert pd.read_parquet(folder / "decisions.parquet").action.tolist() == [decision.action for decision in decisions]
    assert len(json.loads((folder / "table.json").read_text())["data"]) == len(decisions)


def test_the_saved_views_chart_the_policies_and_the_configurations_of_the_study(study: mlflow_store.Study) -> None:
    for record in (STATIC, ADAPTIVE):
        track.track_run.fn(study, record, "home", WEIGHTS)
    track.close_study.fn(study)
    client = MlflowClient(study.tracking_uri)
    tags = client.get_experiment(study.experiment_id).tags
    for key, found in ((POLICIES, 2), (CONFIGURATIONS, 5)):
        state = json.loads(json.loads(tags[TAG_PREFIX + key])["state"])
        runs = client.search_runs([study.experiment_id], state["searchFilter"])
        assert len(runs) == found
        shown = {card["metricKey"] for card in state["compareRunCharts"] if not card["deleted"]}
        assert shown <= {name for run in runs for name in run.data.metrics}
    assert client.get_run(study.run_id).info.status == "FINISHED"
    assert mlflow_store.view_url(study).endswith("/runs?viewStateShareKey=policies&compareRunsMode=CHART")


def test_a_simulated_study_is_compared_by_scenario_and_policy_from_the_start_of_the_workload(
    study: mlflow_store.Study,
) -> None:
    for record in (STATIC, ADAPTIVE):
        found = SimulatedResult(record.policy, record.scenario, 0, 40.0, 1.0, 25.0, summarise(record))
        track.track_simulated.fn(study, found, record)
    track.close_study.fn(study)
    client = MlflowClient(study.tracking_uri)
    state = json.loads(json.loads(client.get_experiment(study.experiment_id).tags[TAG_PREFIX + POLICIES])["state"])
    runs = client.search_runs([study.experiment_id], state["searchFilter"])
    assert sorted(run.data.params["policy"] for run in runs) == ["resplit", "static"]
    assert [key["groupByData"] for key in state["groupBy"]["groupByKeys"]] == ["scenario", "policy"]
    shown = {card["metricKey"] for card in state["compareRunCharts"] if not card["deleted"]}
    assert shown <= {name for run in runs for name in run.data.metrics}
    for run in runs:
        points = client.get_metric_history(run.info.run_id, "over_time/qos_met")
        assert [point.timestamp - run.info.start_time for point in points] == [1000 * point.step for point in points]
        assert points[0].step >= 1
        assert points[-1].step == 40
        assert run.info.end_time - run.info.start_time == 40_000


def test_one_command_opens_the_store(study: mlflow_store.Study) -> None:
    environment, *command = shlex.split(mlflow_store.ui_command(study.tracking_uri, port=5001))
    assert environment == "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    assert Path(command[0]).name == "mlflow"
    assert command[command.index("--backend-store-uri") + 1] == study.tracking_uri
    assert mlflow_store.view_url(study, "http://127.0.0.1:5001") in mlflow_store.how_to_open(study, port=5001)


def test_nothing_is_written_to_the_working_directory(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    study = track.open_study.fn(uri, "resplit", {})
    track.track_run.fn(study, STATIC, "home", WEIGHTS)
    track.close_study.fn(study)
    assert list((tmp_path / "here").iterdir()) == []
    assert {path.name for path in (tmp_path / "mlflow").iterdir()} >= {"mlflow.db", "artifacts"}


@pytest.mark.processes
def test_a_store_whose_creation_was_interrupted_is_created_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = mlflow_store.default_uri(tmp_path)

    def interrupted(tracking_uri: str) -> MlflowClient:
        with closing(sqlite3.connect(tracking_uri.removeprefix("sqlite:///"))) as half:
            half.execute("create table experiments (half integer)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mlflow_store, "client_of", interrupted)
        patched.setattr(track, "client_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_study(uri)
    study = open_study(uri)
    assert MlflowClient(uri).get_run(study.run_id).info.experiment_id == study.experiment_id
    assert {path.name for path in (tmp_path / "mlflow").glob("creating.*")} == {"creating.lock"}


def test_processes_that_create_a_store_at_once_share_one_experiment(tmp_path: Path) -> None:
    uri = mlflow_store.default_uri(tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        studies = pool.map(open_study, [uri, uri])
    assert len({study.experiment_id for study in studies}) == 1
    assert len({study.run_id for study in studies}) == 2
    with closing(sqlite3.connect(tmp_path / "mlflow" / "mlflow.db")) as store:
        assert store.execute("PRAGMA journal_mode").fetchone() == ("wal",)
