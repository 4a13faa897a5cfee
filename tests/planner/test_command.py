"""The command `resplit plan`: answers and exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.problems import EXAMPLES

pytestmark = pytest.mark.processes

FEASIBLE = EXAMPLES / "n004-smollm2-135m-c1-11.json"
INFEASIBLE = EXAMPLES / "n005-llama3.2-1b-c1-tight-20.json"


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resplit.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, input=stdin)


def test_each_file_gets_one_line_and_the_worst_result_decides_the_exit_status(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": 1}')

    done = run(FEASIBLE, broken, INFEASIBLE)

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2
    assert answers[0]["status"] == "optimal"
    assert answers[1]["key"] == "blocks"
    assert answers[2]["status"] == "infeasible"
    assert answers[2]["reason"].startswith("memory short by 150.0 MiB (157338829 bytes)")
    assert "unknown key nodes[].kind" in done.stderr


def test_an_infeasible_file_gives_exit_status_3() -> None:
    assert run(INFEASIBLE).returncode == 3


def test_a_dash_reads_standard_input() -> None:
    done = run("-", stdin=INFEASIBLE.read_text())
    assert done.returncode == 3
    assert json.loads(done.stdout)["status"] == "infeasible"


def test_a_file_that_cannot_be_read_and_broken_json_are_named(tmp_path: Path) -> None:
    missing, broken = run(tmp_path / "absent.json"), run("-", stdin='{"version": ')
    assert (missing.returncode, broken.returncode) == (2, 2)
    absent = f"file = '{tmp_path / 'absent.json'}': cannot be read: No such file or directory"
    assert json.loads(missing.stdout)["error"] == absent
    assert json.loads(broken.stdout)["error"].startswith("- = '{\"version\": ': is not JSON: Expecting value: line 1")


@pytest.mark.parametrize("option", ["--time-limit", "--work-limit", "--tolerance"])
def test_a_negative_limit_is_refused(option: str) -> None:
    done = run(option, "-1", FEASIBLE)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr


def test_importing_the_command_loads_nothing_heavy() -> None:
    script = (
        "import sys, resplit.planner.command\n"
        "print(sorted({'numpy', 'scipy', 'highspy', 'cvxpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
