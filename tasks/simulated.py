"""Simulate: one run of a simulated study in a process of its own, kept so that it is not done again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

import resplit
from resplit.errors import ResplitError
from resplit.scenario import cluster_of, load_scenario
from resplit.simulate.result import SimulatedResult
from tasks.study_records import digest_of

__all__ = ["SimulatedRun", "kept_in", "simulate_in_process"]

_OBJECT = "object.json"
_MODELS = Path("data/models")


@dataclass(frozen=True)
class SimulatedRun:
    """A scenario under a policy, with the workload and the noise of a seed."""

    scenario: Path
    policy: str
    seed: int

    def __str__(self) -> str:
        return f"{self.scenario.stem} {self.policy} {self.seed}"


def kept_in(records: Path, run: SimulatedRun, rivals: Sequence[SimulatedRun] = ()) -> Path:
    """The folder of a run below `records`. Its name covers all that the run depends on.

    That is the code, the policy's own included, what `learned` has learned, the scenario with its traces, the cluster,
    the sizes of models, and for the oracle its `rivals`.
    """
    scenario = load_scenario(run.scenario)
    named = [run.scenario.parent / file for file in scenario.files]
    code = [*_code(), *_own_code(run.policy)]
    files = [run.scenario, cluster_of(run.scenario), *sorted(_MODELS.glob("*.yaml")), *named, *code]
    digest = digest_of(files, *(rival.policy for rival in rivals))
    return records / digest / f"{run.scenario.stem}-{run.policy.replace(':', '.')}-{run.seed}"


def _code() -> list[Path]:
    package = Path(resplit.__file__).parent
    return sorted([*package.rglob("*.py"), *package.rglob("*.json")])


def _own_code(policy: str) -> list[Path]:
    """The module of anybody's own policy, which is called `package.module:Name`."""
    module, _, name = policy.partition(":")
    spec = find_spec(module) if name else None
    return [Path(spec.origin)] if spec and spec.origin else []


@task(task_run_name="{run}", retries=2, retry_delay_seconds=1, cache_policy=NO_CACHE)
def simulate_in_process(run: SimulatedRun, folder: Path, rivals: Sequence[Path] = ()) -> SimulatedResult:
    """The result of a run, whose tables are kept in `folder`; simulated if they are not there.

    `rivals` are the folders of other policies' runs, for the oracle. A process that is killed costs this task only,
    which is tried again; so does a worker that is killed, whose process goes on in a folder of its own. ResplitError
    with the last line of what the process said.
    """
    if not (folder / _OBJECT).exists():
        for left in folder.parent.glob(f"{folder.name}.*.unfinished"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
        given = ["--policy", run.policy, "--seed", str(run.seed), "--out", str(unfinished)]
        given += [word for rival in rivals for word in ("--rival", str(rival))]
        command = [sys.executable, "-m", "resplit.cli", "simulate", str(run.scenario), *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise ResplitError(f"{run}: the simulation failed: {said[-1]}")
        (unfinished / _OBJECT).write_text(done.stdout, encoding="utf-8")
        unfinished.replace(folder)
    return SimulatedResult.from_json((folder / _OBJECT).read_text(encoding="utf-8"))
