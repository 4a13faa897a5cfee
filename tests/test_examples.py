"""The scripts and the notebook in examples/ run, and the scripts print the expected output."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resplit.cli import app
from resplit.cluster.local import Cluster
from tests.support.runs import synthetic_run

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script as `python examples/NAME ARGUMENTS...` would, and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_planning_a_placement_prints_its_segments_and_a_bound(run_example: Callable[..., str]) -> None:
    printed = run_example("plan_placement.py")
    assert "proven to be at least" in printed
    assert "embed .. " in printed


def test_a_custom_solver_can_be_registered_and_called_by_its_name(
    run_example: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resplit.planner import SOLVERS

    monkeypatch.setattr("resplit.planner.SOLVERS", dict(SOLVERS))
    printed = run_example("own_solver.py")
    custom, default = (float(line.split()[2]) for line in printed.splitlines())
    assert default <= custom < float("inf")


@pytest.mark.processes
def test_a_cluster_answers_the_openai_client(run_example: Callable[..., str], cluster: Cluster) -> None:
    assert run_example("talk_to_cluster.py", cluster.url).startswith("tiny-llama: ")


def test_a_saved_run_is_read_and_summarised(run_example: Callable[..., str], tmp_path: Path) -> None:
    synthetic_run(duration_s=40.0).save(tmp_path)
    printed = run_example("read_run.py", str(tmp_path))
    assert "policy resplit" in printed
    assert "downtime incidents" in printed


@pytest.mark.parametrize("notebook", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_runs_from_top_to_bottom_and_holds_no_outputs(notebook: str) -> None:
    cells = json.loads((EXAMPLES / notebook).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), names)


def test_a_policy_of_ones_own_is_simulated_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    arguments = ["simulate", "data/scenarios/home-day.yaml", "--policy", "examples.own_policy:LeaveBusyNodes"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["completed"] == found["offered"]
    assert found["reconfigurations"] >= 1  # others take most of the node `study` at 8 s
