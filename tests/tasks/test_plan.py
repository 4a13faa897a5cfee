"""The files that the control loop keeps between its ticks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resplit.decide import Decision, DecisionOutcome
from resplit.problem import read_problem
from resplit.telemetry.tables import Telemetry
from tasks.plan import load_configurations, save_fast_configurations
from tests.support.decisions import FAST, SLOW, halves, problem


def test_only_configurations_that_were_kept_are_found(tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    assert load_configurations(tmp_path, [1, 2, 3]) == {2: tmp_path / "2"}


class Client:
    """The calls of a control client that are needed: the fast loop deployed epoch 3, another loop epoch 2."""

    def decisions(self, since: int) -> list[Decision]:
        outcomes = [None, DecisionOutcome(deployed=2), DecisionOutcome(deployed=3)]
        made = [Decision(50.0, "re-split", outcome=outcome, id=number) for number, outcome in enumerate(outcomes, 1)]
        return made[since:]

    def problem_of(self, epoch: int) -> Any:
        return problem(halves(FAST, SLOW)) if epoch == 3 else None

    def telemetry(self, since_s: float) -> Telemetry:
        assert since_s == 42.0
        return Telemetry.from_rows({"nodes": [], "links": [], "blocks": []})


def test_the_inputs_of_epochs_that_the_fast_loop_deployed_are_kept_once(tmp_path: Path) -> None:
    client: Any = Client()
    assert save_fast_configurations(client, tmp_path, 8.0, 0) == 3
    assert [folder.name for folder in tmp_path.iterdir()] == ["3"]
    assert read_problem(tmp_path / "3" / "problem.json").current == halves(FAST, SLOW)
    assert {path.name for path in (tmp_path / "3").iterdir()} == {"problem.json", "plan.json", "telemetry"}
    assert save_fast_configurations(client, tmp_path, 8.0, 3) == 3
