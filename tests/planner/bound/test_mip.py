"""Reduced-cost fixing, and the mixed-integer program over intervals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from resplit.planner.bound.dual import Dual
from resplit.planner.bound.mip import candidates, solve_mip
from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.bound.resources import Resources
from resplit.planner.budget import Budget
from resplit.planner.instance import Instance
from tests.support.problems import best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples


def converged(instance: Instance) -> Dual:
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    dual.generate_columns([], Budget(1e9, 300), float("inf"))
    return dual


@given(seeds())
@examples(30)
def test_reduced_cost_fixing_keeps_every_interval_of_the_optimum(seed: int) -> None:
    problem = tiny_problem(seed, blocks=5)
    instance = Instance.of(problem)
    optimum, placement = best_by_enumeration(problem)
    if placement is None:
        return
    nodes_of = instance.nodes_of(placement)
    ends = [0, *(np.flatnonzero(np.diff(nodes_of)) + 1), len(nodes_of)]

    kept = candidates(converged(instance), optimum * (1 + 1e-6))

    intervals = {tuple(row) for row in kept.intervals.tolist()}
    assert {(p, q, int(nodes_of[p])) for p, q in itertools.pairwise(ends)} <= intervals


@given(seeds())
@examples(20)
def test_the_program_without_a_cutoff_finds_and_proves_the_optimum(seed: int) -> None:
    problem = tiny_problem(seed, blocks=5)
    instance = Instance.of(problem)
    optimum, placement = best_by_enumeration(problem)
    dual = converged(instance)
    if dual.bound == float("inf"):
        return

    nodes_of, bound = solve_mip(dual, candidates(dual, float("inf")), float("inf"), Budget(20.0), None, 1e-6)

    if placement is None:
        assert (nodes_of, bound) == (None, float("inf"))
    else:
        assert nodes_of is not None
        assert instance.cost(nodes_of) == pytest.approx(optimum, rel=1e-5)
        assert bound == pytest.approx(optimum, rel=1e-5)
        assert bound <= optimum * (1 + 1e-9)


@pytest.mark.parametrize(("load_share", "rates"), [(1.0, 1e-5), (3e-9, 1e3), (1e-9, 1e4)])
@pytest.mark.parametrize("seed", [0, 12, 22, 33])
def test_the_program_proves_the_optimum_if_loads_are_tiny(seed: int, load_share: float, rates: float) -> None:
    problem = tiny_problem(seed, blocks=4)
    idle = replace(
        problem,
        nodes=tuple(replace(node, load_share=load_share) for node in problem.nodes),
        classes=tuple(replace(c, rate_rps=c.rate_rps * rates) for c in problem.classes),
    )
    dual = converged(Instance.of(idle))

    _, bound = solve_mip(dual, candidates(dual, float("inf")), float("inf"), Budget(20.0), None, 1e-6)

    optimum, _ = best_by_enumeration(idle)
    assert bound == pytest.approx(optimum, rel=1e-5)
    assert bound <= optimum * (1 + 1e-9)


def test_the_bound_is_the_cutoff_if_no_candidate_is_left() -> None:
    dual = converged(Instance.of(tiny_problem(3, blocks=5)))
    cutoff = dual.bound * 0.9

    assert solve_mip(dual, candidates(dual, cutoff), cutoff, Budget(20.0), None, 1e-6) == (None, cutoff)
