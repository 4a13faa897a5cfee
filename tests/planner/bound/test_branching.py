"""Branch and bound, and the bounds of single branches."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.planner.bound.branching import branch_and_bound, by_end, by_link, by_node
from resplit.planner.bound.dual import Dual
from resplit.planner.bound.node_states import NodeStates
from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.bound.resources import Resources
from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate
from resplit.planner.instance import Instance
from resplit.types import Problem
from tests.support.problems import best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples


def converged(dual: Dual) -> None:
    dual.generate_columns([], Budget(1e9, 300), float("inf"))


def best_where(problem: Problem, holds: Callable[[np.ndarray], bool]) -> tuple[float, float]:
    """The optimum of the placements for which `holds` is false, and of those for which it is true, by enumeration."""
    instance, best = Instance.of(problem), [float("inf"), float("inf")]
    for placement in itertools.product(range(len(problem.nodes)), repeat=len(problem.blocks)):
        nodes_of = np.array(placement)
        evaluation = evaluate(problem, instance.placement(nodes_of))
        if not evaluation.violations:
            best[holds(nodes_of)] = min(best[holds(nodes_of)], evaluation.objective)
    return best[0], best[1]


def crosses(nodes_of: np.ndarray, origin: int, node: int) -> bool:
    """Whether the placement crosses the link from `origin` to `node`."""
    return bool(((nodes_of[:-1] == origin) & (nodes_of[1:] == node)).any())


@given(seeds(), st.sampled_from(["node", "end", "link"]), st.integers(0, 2), st.integers(1, 2), st.booleans())
@examples(30)
def test_each_branch_is_bounded_by_its_own_optimum(seed: int, how: str, node: int, step: int, grows: bool) -> None:
    problem = tiny_problem(seed, blocks=5)
    instance, other = Instance.of(problem), (node + step) % 3
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance).tightened(instance, NodeStates.of(instance)))
    converged(dual)
    if grows and dual.bound < float("inf") and dual.grow_neighbourhoods():
        converged(dual)
    if dual.bound == float("inf"):
        return
    whole = dual.bound
    halves, holds = {
        "node": (lambda: by_node(dual, node), lambda x: bool((x == node).any())),
        "end": (lambda: by_end(dual, 4, node), lambda x: bool(x[4] == node)),
        "link": (lambda: by_link(dual, other, node), lambda x: crosses(x, other, node)),
    }[how]

    for part, optimum in zip(halves(), best_where(problem, holds), strict=True):
        converged(part)
        assert whole <= part.bound
        if optimum < float("inf"):
            assert part.bound <= optimum * (1 + 1e-9)
    assert dual.bound == whole


@given(seeds())
@examples(20)
def test_branch_and_bound_proves_no_more_than_the_optimum(seed: int) -> None:
    problem = tiny_problem(seed, blocks=6)
    optimum, placement = best_by_enumeration(problem)
    instance = Instance.of(problem)
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    converged(dual)
    if placement is None:
        return
    before = dual.bound

    bound = branch_and_bound(dual, converged, lambda: optimum * (1 - 1e-6), Budget(1e9, 3_000))

    assert before <= bound <= optimum * (1 + 1e-9)


@pytest.mark.parametrize("seed", [165, 250, 276])
def test_branch_and_bound_closes_gaps_that_prices_leave(seed: int) -> None:
    problem = tiny_problem(seed, blocks=6)
    optimum, _ = best_by_enumeration(problem)
    instance = Instance.of(problem)
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    converged(dual)
    before = dual.bound

    bound = branch_and_bound(dual, converged, lambda: optimum * (1 - 1e-6), Budget(1e9, 3_000))

    assert before < 0.95 * optimum
    assert bound >= 0.999 * optimum
