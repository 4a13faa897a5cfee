"""The simulated study: resumed, repeatable bit for bit, and not stopped by a process that is killed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from flows.params import SimulatedParams, load_params
from flows.simulated import named_policies, run_simulated_study
from resplit.errors import ResplitError
from resplit.policies import ABLATIONS, POLICIES, learned
from tasks import simulated
from tasks.mlflow_store import default_uri
from tasks.simulated import SimulatedRun, kept_in, simulate_in_process
from tests.support.killed_worker import MARK, KillsItsWorker

HOME_DAY = Path("data/scenarios/home-day.yaml")
RUN = SimulatedRun(HOME_DAY, "static", 1)
PARAMS = load_params().simulated.model_copy(
    update={"scenarios": ("home-day",), "policies": ("static", "clairvoyant", "oracle"), "seeds": 1}
)


def study(params: SimulatedParams, folder: Path, records: str = "records") -> tuple[str, bytes]:
    table = run_simulated_study(params, folder / "state", folder / records, folder / "reports")
    return table, (folder / "reports" / "metrics.json").read_bytes()


@pytest.mark.processes
@pytest.mark.usefixtures("prefect_server")
def test_a_study_resumes_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    table, metrics = study(PARAMS, tmp_path)
    assert "| home-day | oracle |" in table.splitlines()[2]
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.json")}
    assert study(PARAMS, tmp_path) == (table, metrics)
    assert done == {path: path.stat().st_mtime_ns for path in (tmp_path / "records").rglob("*.json")}
    client = MlflowClient(default_uri(tmp_path / "state"))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    children = [run for run in runs if run.data.params.get("kind") == "simulated"]
    assert sorted(run.data.params["policy"] for run in children) == sorted(2 * PARAMS.policies)
    assert all(run.data.metrics["latency_mean_s"] > 0 for run in children)
    assert study(PARAMS, tmp_path, "again") == (table, metrics)


def test_groups_of_policies_have_names_and_nobody_runs_twice() -> None:
    assert named_policies(["static", "oracle"]) == ["static", "oracle"]
    found = named_policies(["resplit", "all", "ablations"])
    assert found[0] == "resplit"
    assert sorted(found) == sorted([*POLICIES, "oracle", *ABLATIONS])


def test_the_key_covers_the_code_and_the_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, code = kept_in(tmp_path, RUN), tmp_path / "planner.py"
    code.write_text("x = 1")
    monkeypatch.setattr(simulated, "_code", lambda: [code])
    one = kept_in(tmp_path, RUN)
    code.write_text("x = 2")
    assert len({before, one, kept_in(tmp_path, RUN), kept_in(tmp_path, SimulatedRun(HOME_DAY, "static", 2))}) == 4
    assert kept_in(tmp_path, RUN).parent != one.parent


def test_the_key_covers_a_policy_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "mine_to_change.py"
    module.write_text("x = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = SimulatedRun(HOME_DAY, "mine_to_change:Name", 1)
    before = kept_in(tmp_path, run)
    module.write_text("x = 2")
    assert kept_in(tmp_path, run) != before


def test_the_key_covers_what_was_learned() -> None:
    assert simulated._code().count(Path(learned.__file__).with_suffix(".json")) == 1


def test_the_key_of_the_oracle_covers_whom_it_compares(tmp_path: Path) -> None:
    rivals = [SimulatedRun(HOME_DAY, policy, 1) for policy in ("static", "clairvoyant")]
    oracle = SimulatedRun(HOME_DAY, "oracle", 1)
    assert kept_in(tmp_path, oracle, rivals) != kept_in(tmp_path, oracle, rivals[:1])


@pytest.mark.processes
@pytest.mark.usefixtures("prefect_server")
def test_a_worker_of_dask_that_is_killed_costs_only_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefect_dask", reason="the extra `dask` is not installed")
    mark = tmp_path / "killed"
    monkeypatch.setenv(MARK, str(mark))  # Dask's workers inherit it
    killer = f"{KillsItsWorker.__module__}:{KillsItsWorker.__name__}"
    params = PARAMS.model_copy(update={"policies": ("static", killer), "runner": "dask", "workers": 2})
    table, _ = study(params, tmp_path)
    assert not psutil.pid_exists(int(mark.read_text()))
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == ["static", killer]
    folders = sorted(path.parent.name for path in (tmp_path / "records").rglob("object.json"))
    assert folders == sorted(["home-day-static-1", f"home-day-{killer.replace(':', '.')}-1"])


@pytest.mark.processes
@pytest.mark.usefixtures("prefect_server")
def test_a_study_on_ray_finds_what_one_on_processes_finds(tmp_path: Path) -> None:
    pytest.importorskip("prefect_ray", reason="the extra `ray` is not installed")
    params = PARAMS.model_copy(update={"policies": ("static",), "seeds": 2})
    on_ray = study(params.model_copy(update={"runner": "ray"}), tmp_path, "ray")
    assert on_ray == study(params, tmp_path, "processes")


@pytest.mark.processes
def test_a_process_that_is_killed_costs_one_attempt_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suicide = tmp_path / "python"
    suicide.write_text("#!/bin/sh\nkill -9 $$\n")
    suicide.chmod(0o700)
    folder = tmp_path / "run"
    with monkeypatch.context() as killed:
        killed.setattr(sys, "executable", str(suicide))
        with pytest.raises(ResplitError, match=rf"home-day static 1: the simulation failed: .* {-signal.SIGKILL}"):
            simulate_in_process.fn(RUN, folder)
    assert not folder.exists()
    assert simulate_in_process.fn(RUN, folder).policy == "static"
    assert simulate_in_process.retries == 2
