"""The simulated study: policies x scenarios x seeds, many at a time. What is done is not done again."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from prefect import flow
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows import STATE
from flows.command import run_command
from flows.params import SCENARIOS, SimulatedParams, load_params
from resplit.errors import ConfigError, ResplitError
from resplit.intervals import Interval
from resplit.policies import ABLATIONS, POLICIES
from resplit.records import RunRecord
from resplit.simulate.comparison import compared_runs, table_of
from resplit.simulate.oracle import ORACLE
from resplit.simulate.result import SimulatedResult
from tasks.mlflow_store import default_uri
from tasks.simulated import SimulatedRun, kept_in, simulate_in_process
from tasks.track import close_study, open_study, track_simulated

__all__ = ["named_policies", "run_simulated_study"]

RECORDS, REPORTS = Path("data/generated/simulated"), Path("reports/simulated")
GROUPS = {"all": (*POLICIES, ORACLE), "ablations": tuple(ABLATIONS)}  # of policies, by the names in `params.yaml`
_log = structlog.get_logger(__name__)


def run_simulated_study(
    params: SimulatedParams, state: Path = STATE, records: Path = RECORDS, reports: Path = REPORTS
) -> str:
    """Simulate what `params` name, and write `metrics.json` and `table.md` to `reports`; returns the table.

    ResplitError names the runs that failed, after all others are done.
    """
    study = _simulated_study.with_options(task_runner=_task_runner(params))
    compared = compared_runs(study(params, state, records))
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "metrics.json").write_text(json.dumps(_plain(compared), indent=1, sort_keys=True), encoding="utf-8")
    table = table_of(compared)
    (reports / "table.md").write_text(table, encoding="utf-8")
    return table


@flow(name="simulated study", validate_parameters=False)
def _simulated_study(params: SimulatedParams, state: Path, records: Path) -> list[SimulatedResult]:
    """Submit all runs, and track each in MLflow as it is done. The oracle waits for those that it compares."""
    policies = named_policies(params.policies)
    about = {"policies": " ".join(policies), "seeds": params.seeds, "workers": params.workers}
    tracked = open_study(os.environ.get("MLFLOW_TRACKING_URI") or default_uri(state), "simulated", about)
    submitted: dict[SimulatedRun, _Submitted] = {}
    for scenario in params.scenarios:
        for seed in range(params.first_seed, params.first_seed + params.seeds):
            runs = [SimulatedRun(SCENARIOS / f"{scenario}.yaml", policy, seed) for policy in policies]
            submitted |= _submit(runs, records)
    found, failed = [], []
    for run, each in submitted.items():
        each.future.wait()
        if not each.future.state.is_completed():
            failed.append(str(run))
            _log.warning("run failed", run=str(run))
            continue
        found.append(each.future.result())
        track_simulated(tracked, found[-1], RunRecord.load(each.folder))
        _log.info("run done", run=str(run), done=len(found), of=len(submitted))
    close_study(tracked)
    if failed:
        raise ResplitError(f"{len(failed)} runs failed: {', '.join(failed)}; run again: what is done is kept")
    return found


def named_policies(names: Sequence[str]) -> list[str]:
    """The policies that `names` are, with the members of `GROUPS` in place of their names; each one once."""
    return list(dict.fromkeys(policy for name in names for policy in GROUPS.get(name, (name,))))


@dataclass(frozen=True)
class _Submitted:
    """A run under way, and the folder in which its tables will be."""

    future: PrefectFuture[SimulatedResult]
    folder: Path


def _submit(runs: Sequence[SimulatedRun], records: Path) -> dict[SimulatedRun, _Submitted]:
    """The runs of one scenario and seed."""
    folders = {run: kept_in(records, run) for run in runs if run.policy != ORACLE}
    submitted = {run: _Submitted(simulate_in_process.submit(run, folder), folder) for run, folder in folders.items()}
    rivals = [run for run in folders if run.policy not in ABLATIONS]
    for run in runs:
        if run.policy == ORACLE:
            folder = kept_in(records, run, rivals)
            future = simulate_in_process.submit(
                run,
                folder,
                [folders[rival] for rival in rivals],
                wait_for=[submitted[rival].future for rival in rivals],
                return_state=False,
            )
            submitted[run] = _Submitted(future, folder)
    return submitted


def _task_runner(params: SimulatedParams) -> TaskRunner[Any]:
    """Each run is a process of its own in any case: threads, or the workers of Dask or Ray, wait for them."""
    if params.runner == "processes":
        return ThreadPoolTaskRunner(max_workers=params.workers)
    try:
        return _dask(params.workers) if params.runner == "dask" else _ray(params.workers)
    except ImportError:
        needed = f"{params.runner!r} needs prefect-{params.runner}: install resplit[{params.runner}]"
        raise ConfigError("params.yaml: simulated.runner", needed) from None


def _dask(workers: int) -> TaskRunner[Any]:
    from prefect_dask.task_runners import DaskTaskRunner

    return DaskTaskRunner(cluster_kwargs={"n_workers": workers, "threads_per_worker": 1, "processes": True})


def _ray(workers: int) -> TaskRunner[Any]:
    from prefect_ray import RayTaskRunner

    runner: TaskRunner[Any] = RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})
    return runner


def _plain(compared: dict[str, dict[str, dict[str, Interval]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Each mean, and half of its interval as `NAME_ci95`; null where nothing is known."""

    def known(value: float) -> float | None:
        return round(value, 6) if math.isfinite(value) else None

    return {
        scenario: {
            policy: {
                f"{name}{ending}": known(value) for name, pair in metrics.items() for ending, value in _named(pair)
            }
            for policy, metrics in policies.items()
        }
        for scenario, policies in compared.items()
    }


def _named(pair: Sequence[float]) -> list[tuple[str, float]]:
    return [("", pair[0]), ("_ci95", pair[1])]


def main() -> None:
    """`python -m flows.simulated`: the simulated study of `params.yaml`."""

    def run() -> None:
        begun_s = time.monotonic()
        sys.stdout.write(run_simulated_study(load_params().simulated))
        _log.info("study done", seconds=round(time.monotonic() - begun_s))

    run_command(run)


if __name__ == "__main__":
    main()
