"""The choice among plans of nearly equal cost."""

from __future__ import annotations

from dataclasses import replace

from resplit.planner import solve
from resplit.planner.evaluate import evaluate, moved_bytes
from resplit.problem import read_problem
from resplit.types import Problem
from tests.support.problems import EXAMPLES


def drifted_example() -> tuple[Problem, tuple[str, ...]]:
    """A problem whose current placement was optimal before the rate rose."""
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c1-13.json")
    plan = solve(problem, time_limit_s=2.0)
    assert plan.placement is not None
    busier = tuple(replace(c, rate_rps=c.rate_rps * 1.05) for c in problem.classes)
    return replace(problem, classes=busier, current=plan.placement), plan.placement


def test_the_current_placement_stays_within_tolerance() -> None:
    problem, current = drifted_example()

    strict = solve(problem, time_limit_s=2.0)
    tolerant = solve(problem, time_limit_s=2.0, tolerance=0.05)

    assert tolerant.objective is not None
    assert strict.objective is not None
    assert strict.objective <= tolerant.objective <= strict.objective * 1.05
    assert tolerant.placement == current
    assert tolerant.moved_bytes == 0


def test_fewer_bytes_move_within_tolerance() -> None:
    problem, current = drifted_example()
    best = solve(replace(problem, current=None), time_limit_s=2.0)
    assert best.placement is not None
    other = tuple(current[-1] if name == current[0] else name for name in best.placement)
    moved_problem = replace(problem, current=other)

    strict = solve(moved_problem, time_limit_s=2.0)
    tolerant = solve(moved_problem, time_limit_s=2.0, tolerance=0.02)

    assert tolerant.objective is not None
    assert best.objective is not None
    assert tolerant.objective <= best.objective * 1.0201
    assert tolerant.moved_bytes is not None
    assert strict.moved_bytes is not None
    assert tolerant.moved_bytes <= strict.moved_bytes
    assert tolerant.moved_bytes == moved_bytes(moved_problem, tolerant.placement or ())


def test_a_plan_that_meets_the_objectives_is_preferred() -> None:
    problem = read_problem(EXAMPLES / "n006-llama3.2-1b-c2-12.json")
    best = solve(problem, time_limit_s=2.0)
    assert best.placement is not None
    latency = evaluate(problem, best.placement).class_latency_s
    demanding = replace(
        problem,
        classes=tuple(
            replace(c, slo_s=float(t) * share)
            for c, t, share in zip(problem.classes, latency, (0.99, 1.3), strict=True)
        ),
    )

    strict = solve(demanding, time_limit_s=2.0)
    tolerant = solve(demanding, time_limit_s=2.0, tolerance=0.1)

    assert list(strict.slo_shortfall_s) == ["class-0"]
    assert tolerant.slo_shortfall_s == {}


def test_the_shortfall_of_an_unreachable_objective_is_reported() -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c2-tight-nulls-19.json")

    plan = solve(problem, time_limit_s=1.0, tolerance=0.02)

    for request_class in problem.classes:
        assert request_class.slo_s is not None
        shortfall = plan.class_latency_s[request_class.name] - request_class.slo_s
        assert abs(plan.slo_shortfall_s[request_class.name] - shortfall) < 1e-9
