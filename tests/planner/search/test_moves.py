"""The compiled moves of simulated annealing, and the penalised cost of a placement."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from resplit.planner.evaluate import block_bytes
from resplit.planner.instance import Instance
from resplit.planner.search.kernel_arrays import MIN_EXCESS_ATOMS, KernelArrays
from resplit.planner.search.moves import COLUMNS, LIMIT_KINDS, _apply_move, _evaluate, penalised_cost, walk
from tests.support.problems import seeds, tiny_problem
from tests.support.properties import examples

FREE = np.zeros(LIMIT_KINDS)


@given(seeds())
@examples(25)
def test_a_placement_costs_its_objective_if_it_is_legal_and_violates_a_limit_if_not(seed: int) -> None:
    instance = Instance.of(tiny_problem(seed, blocks=4))
    arrays = KernelArrays.of(instance)
    atoms, nodes = instance.shape

    for placement in itertools.product(range(nodes), repeat=atoms):
        cost, broken = penalised_cost(np.array(placement, np.int64), arrays, FREE)

        legal = instance.cost(np.array(placement, np.intp))
        assert (broken == 0) == np.isfinite(legal)
        if np.isfinite(legal):
            assert cost == pytest.approx(legal, rel=1e-12)


@given(seeds())
@examples(25)
def test_the_change_by_a_move_is_the_difference_of_the_costs(seed: int) -> None:
    instance = Instance.of(tiny_problem(seed, blocks=6))
    arrays, penalty = KernelArrays.of(replace(instance, balance_weight=0.0)), np.ones(LIMIT_KINDS)
    before, after = np.random.default_rng(seed).integers(0, 3, (2, 6))
    sums, saved = np.zeros((2, 3, COLUMNS))
    _evaluate(before, arrays, penalty, sums)

    change, broken, _ = _apply_move(before, after, 0, 6, arrays, penalty, sums, saved)

    (old_cost, old_broken), (new_cost, new_broken) = (penalised_cost(x, arrays, penalty) for x in (before, after))
    assert change == pytest.approx(new_cost - old_cost, rel=1e-9, abs=1e-9 * max(old_cost, new_cost))
    assert broken == new_broken - old_broken


@pytest.mark.parametrize("short_bytes", [1e3, 1e6])
def test_a_small_violation_counts_as_half_an_atom_more(short_bytes: float) -> None:
    problem = tiny_problem(5, blocks=4)
    needed = block_bytes(problem).sum()
    nodes = tuple(replace(n, memory_bytes=needed - short_bytes, trusted=True) for n in problem.nodes)
    instance = Instance.of(replace(problem, nodes=nodes))
    arrays, everything = KernelArrays.of(instance), np.zeros(4, np.int64)

    free, _ = penalised_cost(everything, arrays, FREE)
    cost, broken = penalised_cost(everything, arrays, np.array([1.0, 0.0, 0.0]))

    assert broken >= 1
    assert cost - free == pytest.approx(short_bytes + MIN_EXCESS_ATOMS * instance.memory.mean(), rel=1e-5)


@given(seeds())
@examples(25)
def test_a_walk_returns_the_cost_of_its_best_legal_placement(seed: int) -> None:
    instance = Instance.of(tiny_problem(seed, blocks=6, nodes=4))
    here = np.random.default_rng(seed).integers(0, 4, 6)
    best, penalty = np.zeros(6, np.int64), np.ones(LIMIT_KINDS)
    random = np.array([seed + 1], np.uint64)

    cost = walk(here, best, np.inf, KernelArrays.of(instance), penalty, np.ones(LIMIT_KINDS), 1.0, 0.01, 3000, random)

    assert ((here >= 0) & (here < 4)).all()
    if cost < np.inf:
        assert instance.cost(best.astype(np.intp)) == pytest.approx(cost, rel=1e-12)


def test_a_walk_works_with_one_block_and_one_node() -> None:
    instance = Instance.of(tiny_problem(3, blocks=1, nodes=1))
    here = np.zeros(1, np.int64)

    cost = walk(
        here, here.copy(), np.inf, KernelArrays.of(instance), np.ones(LIMIT_KINDS), np.ones(LIMIT_KINDS), 1.0, 0.1, 500,
        np.ones(1, np.uint64),
    )  # fmt: skip

    assert cost == pytest.approx(instance.cost(np.zeros(1, np.intp)))
