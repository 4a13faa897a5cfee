from __future__ import annotations

import pytest
from hypothesis import given, settings

from resplit.planner import SOLVERS, solve
from resplit.planner.evaluate import evaluate
from resplit.problem import read_problem
from tests.support.problems import EXAMPLES, best_by_enumeration, seeds, tiny_problem

BASELINES = [name for name in SOLVERS if name not in ("relax", "exact")]


@pytest.mark.parametrize("name", BASELINES)
@given(seed=seeds())
@settings(max_examples=15, deadline=None)
def test_a_baseline_returns_a_legal_plan_or_a_reason(name: str, seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    optimum, _ = best_by_enumeration(problem)

    plan = solve(problem, solver=name)

    if plan.placement is None:
        assert plan.status in ("unknown", "infeasible")
        assert plan.reason
    else:
        assert evaluate(problem, plan.placement).violations == ()
        assert plan.objective is not None
        assert plan.objective >= optimum * (1 - 1e-9)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_answers_on_a_real_problem(name: str) -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c3-14.json")

    plan = solve(problem, solver=name)

    assert plan.solver == name
    assert plan.placement is not None or plan.reason


def test_greedy_and_latency_dp_find_plans_if_memory_is_ample() -> None:
    problem = read_problem(EXAMPLES / "n004-smollm2-135m-c1-11.json")

    for name in ("greedy", "latency-dp"):
        assert solve(problem, solver=name).placement is not None
