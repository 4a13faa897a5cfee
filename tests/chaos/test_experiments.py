"""Short runs of the experiments of `make chaos`: they find no broken promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

# Live re-splits and nodes that hang are left to tests/system.
SHORT = {
    "kills": 0.07,
    "controller_crashes": 0.05,
    "random_schedules": 0.03,
    "registry_outage": 0.2,
    "full_disk": 1.0,
}


@pytest.mark.parametrize("name", SHORT)
def test_an_experiment_finds_no_broken_promise(name: str, tmp_path: Path) -> None:
    options = ["--only", name, "--scale", str(SHORT[name]), "--reports", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.chaos", *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((tmp_path / "chaos.json").read_text())["findings"]
    assert findings
    assert [finding for finding in findings if finding["met"] is False] == []
