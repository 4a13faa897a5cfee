"""Steepest descent over interval moves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given

from resplit.planner.budget import Budget
from resplit.planner.instance import Instance
from resplit.planner.search.descent import Descent
from tests.support.problems import best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples


@given(seeds())
@examples(30)
def test_the_delta_of_a_move_between_legal_placements_is_the_change_of_the_objective(seed: int) -> None:
    problem = tiny_problem(seed, blocks=5)
    instance = Instance.of(problem)
    _, placement = best_by_enumeration(problem)
    if placement is None:
        return
    here, descent = instance.nodes_of(placement), Descent(instance, 1e3)

    delta = descent.deltas(here)

    for move, node in itertools.product(*map(range, delta.shape)):
        after = instance.cost(descent.apply_move(here, move, node))
        if np.isfinite(after):
            assert delta[move, node] == pytest.approx(after - instance.cost(here), abs=1e-9)
        else:
            assert delta[move, node] > 0  # the penalty exceeds every gain


@given(seeds())
@examples(30)
def test_no_move_improves_the_end_of_a_descent(seed: int) -> None:
    instance = Instance.of(tiny_problem(seed, blocks=6))
    runs = np.isfinite(instance.load)
    if not runs.any(axis=1).all():
        return
    descent = Descent(instance, 10.0)

    end = descent.descend(runs.argmax(axis=1), Budget(1e9, 1000))

    assert (descent.deltas(end) >= -1e-8).all()


def test_a_descent_makes_no_move_without_budget() -> None:
    instance = Instance.of(tiny_problem(3, blocks=6))
    start = np.isfinite(instance.load).argmax(axis=1)

    assert Descent(instance, 10.0).descend(start, Budget(1e9, 0)).tolist() == start.tolist()
