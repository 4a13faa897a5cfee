from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resplit.planner.budget import Budget
from resplit.planner.divide import divide
from resplit.planner.dual import Dual
from resplit.planner.evaluate import evaluate
from resplit.planner.instance import Instance
from resplit.planner.paths import IntervalPaths
from resplit.planner.resources import Resources
from resplit.types import Problem
from tests.planner.helpers import best_by_enumeration, seeds, tiny_problem


def converged(dual: Dual) -> None:
    dual.improve([], Budget(1e9, 300), float("inf"))


def best_of_each(problem: Problem, node: int) -> tuple[float, float]:
    """The optimum over placements that do not use a node, and over those that do, by trying every one."""
    instance, best = Instance.of(problem), [float("inf"), float("inf")]
    for placement in itertools.product(range(len(problem.nodes)), repeat=len(problem.blocks)):
        evaluation = evaluate(problem, instance.placement(np.array(placement)))
        if not evaluation.violations:
            best[node in placement] = min(best[node in placement], evaluation.objective)
    return best[0], best[1]


@given(seeds(), st.integers(0, 2), st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_part_is_bounded_by_the_best_of_its_own(seed: int, node: int, remembers: bool) -> None:
    problem = tiny_problem(seed, blocks=5)
    instance = Instance.of(problem)
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    converged(dual)
    if remembers and dual.bound < float("inf") and dual.remember():
        converged(dual)
    if dual.bound == float("inf"):
        return
    whole = dual.bound

    for part, optimum in zip(dual.divided(node), best_of_each(problem, node), strict=True):
        converged(part)
        assert whole <= part.bound
        if optimum < float("inf"):
            assert part.bound <= optimum * (1 + 1e-9)
    assert dual.bound == whole


@given(seeds())
@settings(max_examples=30, deadline=None)
def test_dividing_proves_no_more_than_the_optimum(seed: int) -> None:
    problem = tiny_problem(seed, blocks=6)
    optimum, placement = best_by_enumeration(problem)
    instance = Instance.of(problem)
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    converged(dual)
    if placement is None or not dual.remember():
        return
    converged(dual)

    bound = divide(dual, converged, lambda: optimum * (1 - 1e-6), Budget(1e9, 3_000))

    assert dual.bound <= bound <= optimum * (1 + 1e-9)


@pytest.mark.parametrize("seed", [3, 16, 33])
def test_dividing_closes_gaps_that_prices_leave_open(seed: int) -> None:
    problem = tiny_problem(seed, blocks=6)
    optimum, _ = best_by_enumeration(problem)
    instance = Instance.of(problem)
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    converged(dual)

    bound = divide(dual, converged, lambda: optimum * (1 - 1e-6), Budget(1e9, 3_000))

    assert dual.bound < 0.95 * optimum
    assert bound >= 0.999 * optimum
