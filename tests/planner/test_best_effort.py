"""Plans for clusters that cannot serve the whole demand within their ceilings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.planner import solve
from resplit.planner.best_effort import ceilings_note, solve_best_effort
from resplit.planner.evaluate import evaluate
from resplit.types import Problem
from tests.support.problems import tiny_problem


def with_rates(problem: Problem, factor: float) -> Problem:
    return replace(problem, classes=tuple(replace(c, rate_rps=c.rate_rps * factor) for c in problem.classes))


def with_background(problem: Problem, share: float) -> Problem:
    return replace(problem, nodes=tuple(replace(node, background_utilization=share) for node in problem.nodes))


@pytest.fixture
def problem() -> Problem:
    return next(posed for posed in map(tiny_problem, range(100)) if solve(posed).placement is not None)


def test_a_demand_that_the_nodes_can_serve_is_planned_in_full(problem: Problem) -> None:
    found = solve_best_effort(problem)
    assert (found.plan.placement, found.demand_share, found.note) == (solve(problem).placement, 1.0, "")


def test_too_much_demand_is_planned_in_part_and_twice_that_part_has_no_plan(problem: Problem) -> None:
    demanding = with_rates(problem, 20)
    assert solve(demanding).placement is None
    found = solve_best_effort(demanding)
    assert found.plan.placement is not None
    assert 0 < found.demand_share < 1
    assert not evaluate(with_rates(demanding, found.demand_share), found.plan.placement).violations
    assert solve(with_rates(demanding, min(1.0, 2 * found.demand_share))).placement is None
    assert found.note == f"the plan is for {found.demand_share:.0%} of the demand"


def test_a_problem_that_lacks_memory_has_no_plan_at_any_rate(problem: Problem) -> None:
    short_of_memory = replace(problem, nodes=tuple(replace(node, memory_bytes=1.0) for node in problem.nodes))
    found = solve_best_effort(short_of_memory)
    assert found.plan.placement is None
    assert (found.demand_share, found.note) == (1.0, "")
    assert found.plan.reason == solve(short_of_memory).reason


def test_busy_nodes_are_not_blamed_for_the_memory_of_a_lost_one(problem: Problem) -> None:
    needed = sum(block.weight_bytes + problem.kv_tokens * block.kv_bytes_per_token for block in problem.blocks)
    nodes = tuple(replace(n, memory_bytes=0.45 * needed, trusted=True) for n in problem.nodes)  # 3 nodes
    prefill, decode = problem.prefill_s_per_token.copy(), problem.decode_s_per_token.copy()
    prefill[:, 0] = decode[:, 0] = np.nan
    lost = replace(problem, nodes=nodes, prefill_s_per_token=prefill, decode_s_per_token=decode)

    found = solve_best_effort(with_background(lost, 0.99))

    assert found.plan.placement is None
    assert (found.plan.reason or "").startswith("memory short by")


@pytest.mark.parametrize("background", [0.945, 0.96, 0.99])
def test_nodes_that_others_keep_busy_are_slow_and_not_forbidden(problem: Problem, background: float) -> None:
    busy = with_background(with_rates(problem, 0.01), background)
    assert solve(busy).placement is None or background < 0.95
    found = solve_best_effort(busy)
    assert found.plan.placement is not None
    assert found.demand_share == 1.0
    assert {each.kind for each in evaluate(busy, found.plan.placement).violations} <= {"utilization"}
    assert ("no plan keeps max_utilization: node-" in found.note) == (background > 0.95)


def test_ceilings_rise_no_more_than_the_demand_needs(problem: Problem) -> None:
    busy = with_background(with_rates(problem, 1e-3), 0.96)
    light = solve_best_effort(busy)
    assert max(light.plan.utilization.values()) <= 0.96 + 0.5 * 0.04
    assert "above its 95.0%" in light.note


def test_the_note_names_only_nodes_that_the_plan_loads_above_their_ceilings(problem: Problem) -> None:
    names = [node.name for node in problem.nodes]
    busy = with_background(problem, 0.9)
    assert ceilings_note(busy, dict.fromkeys(names, 0.95)) == ""
    assert ceilings_note(busy, dict(zip(names, (0.97, 0.9, 0.95), strict=True))) == (
        "no plan keeps max_utilization: node-0 is planned to be 97.0% busy, above its 95.0%"
    )
    assert ceilings_note(with_background(problem, 0.97), dict.fromkeys(names, 0.97)) == ""
