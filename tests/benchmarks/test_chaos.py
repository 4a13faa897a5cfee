"""Short runs of the experiments of `make chaos`: they find no broken promise."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.chaos import experiment
from benchmarks.chaos.findings import Finding
from benchmarks.chaos.kills import NEW_TOKENS, kill_nodes
from resplit.cluster.local import Cluster
from tests.support.streams import expected_tokens

pytestmark = pytest.mark.processes

# Live re-splits and nodes that hang are left to tests/system.
SHORT = {"controller_crashes": 0.05, "random_schedules": 0.03, "full_disk": 1.0, "hostile": 0.04}
TIMED = {"hostile"}  # requests have to be answered in time


def broken(findings: list[Finding]) -> list[Finding]:
    """The findings that do not reach their aim."""
    assert findings
    return [finding for finding in findings if finding.met is False]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.alone) if name in TIMED else name for name in SHORT]
)
def test_an_experiment_finds_no_broken_promise(name: str, tmp_path: Path) -> None:
    assert broken(asyncio.run(experiment(name)(SHORT[name], tmp_path))) == []


@pytest.mark.alone  # it has to notice losses in time
async def test_killed_nodes_break_no_promise(cluster: Cluster, unsplit_model: torch.nn.Module) -> None:
    expected = expected_tokens(unsplit_model, NEW_TOKENS)
    assert broken(await kill_nodes(cluster, expected, 2)) == []


def test_the_command_runs_an_experiment_and_writes_its_findings(tmp_path: Path) -> None:
    options = ["--only", "registry_outage", "--scale", "0.2", "--reports", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.chaos", *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((tmp_path / "chaos.json").read_text())["findings"]
    assert broken([Finding(**finding) for finding in findings]) == []
