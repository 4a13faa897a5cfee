from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings

from resplit.errors import ConfigError
from resplit.planner import solve
from resplit.planner.evaluate import evaluate
from resplit.problem import read_problem
from tests.planner.helpers import EXAMPLES, best_by_enumeration, seeds, tiny_problem


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_plans_of_the_examples_are_legal_and_bounded_by_what_is_known(path: Path) -> None:
    known = json.loads(path.read_text())["known"]
    problem = read_problem(path)

    plan = solve(problem, time_limit_s=1.0)

    if known["placement"] is None:
        assert plan.status == "infeasible"
        assert plan.placement is None
        return
    assert plan.placement is not None
    assert plan.objective is not None
    assert plan.lower_bound is not None
    evaluation = evaluate(problem, plan.placement)
    assert evaluation.violations == ()
    assert evaluation.objective == pytest.approx(plan.objective, rel=1e-9)
    assert plan.lower_bound <= known["objective"] * (1 + 1e-9)


@given(seeds())
@settings(max_examples=40, deadline=None)
def test_bound_optimum_and_objective_stand_in_order(seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    optimum, placement = best_by_enumeration(problem)

    plan = solve(problem, time_limit_s=2.0)

    if placement is None:
        assert plan.status in ("infeasible", "unknown")
        assert plan.reason
        return
    assert plan.lower_bound is not None
    assert plan.lower_bound <= optimum * (1 + 1e-9)
    if plan.objective is not None:
        assert plan.objective >= optimum * (1 - 1e-9)


def test_a_solver_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'best' is none of relax"):
        solve(tiny_problem(1), solver="best")
