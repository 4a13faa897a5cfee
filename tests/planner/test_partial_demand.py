"""Plans for the part of the demand that the nodes can serve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resplit.planner import solve
from resplit.planner.evaluate import evaluate
from resplit.planner.partial_demand import solve_partial_demand
from resplit.types import Problem
from tests.support.problems import tiny_problem


def with_rates(problem: Problem, factor: float) -> Problem:
    return replace(problem, classes=tuple(replace(c, rate_rps=c.rate_rps * factor) for c in problem.classes))


@pytest.fixture
def problem() -> Problem:
    return next(posed for posed in map(tiny_problem, range(100)) if solve(posed).placement is not None)


def test_a_demand_that_the_nodes_can_serve_is_planned_in_full(problem: Problem) -> None:
    plan, share = solve_partial_demand(problem)
    assert (plan.placement, share) == (solve(problem).placement, 1.0)


def test_too_much_demand_is_planned_in_part_and_twice_that_part_has_no_plan(problem: Problem) -> None:
    demanding = with_rates(problem, 20)
    assert solve(demanding).placement is None
    plan, share = solve_partial_demand(demanding)
    assert plan.placement is not None
    assert 0 < share < 1
    assert not evaluate(with_rates(demanding, share), plan.placement).violations
    assert solve(with_rates(demanding, min(1.0, 2 * share))).placement is None


def test_a_problem_that_lacks_memory_has_no_plan_at_any_rate(problem: Problem) -> None:
    short_of_memory = replace(problem, nodes=tuple(replace(node, memory_bytes=1.0) for node in problem.nodes))
    plan, share = solve_partial_demand(short_of_memory)
    assert plan.placement is None
    assert share == 1.0
    assert plan.reason == solve(short_of_memory).reason
