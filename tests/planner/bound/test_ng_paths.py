"""The pricing of ng-route paths, and the node states that it uses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.planner.bound import labels as labels_module
from resplit.planner.bound import node_states as states_module
from resplit.planner.bound.ng_paths import Cycle, Neighbourhoods, NgPaths, find_cycles
from resplit.planner.bound.node_states import NodeStates
from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate
from resplit.planner.instance import Instance
from resplit.types import Problem
from tests.support.paths import path_price, random_costs
from tests.support.problems import seeds, tiny_problem
from tests.support.properties import examples

PLENTY = 100_000
EVERYTHING = np.ones((3, 3), dtype=bool)


def layered_problem(seed: int, blocks: int = 6) -> Problem:
    """Like `tiny_problem`, with blocks of two kinds, so that different sets of blocks lead to the same state."""
    problem = tiny_problem(seed, blocks)
    of_kind = np.random.default_rng(seed).integers(0, 2, blocks)
    return replace(
        problem,
        blocks=tuple(replace(problem.blocks[k], name=f"block-{j}", private=False) for j, k in enumerate(of_kind)),
        prefill_s_per_token=problem.prefill_s_per_token[of_kind],
        decode_s_per_token=problem.decode_s_per_token[of_kind],
    )


def ng_paths(instance: Instance, contains: np.ndarray, max_labels: int = PLENTY, coarse: bool = False) -> NgPaths:
    states = NodeStates.of(instance)
    states = states.coarse(instance) if coarse else states
    return NgPaths(IntervalPaths(instance), states, Neighbourhoods(contains, coarse), max_labels)


@given(seeds(), st.integers(0, 511), st.sampled_from([tiny_problem, layered_problem]), st.booleans())
@examples(50)
def test_pricing_finds_the_cheapest_ng_route_of_enumeration(seed: int, bits: int, draw: type, coarse: bool) -> None:
    contains = np.array([bits >> bit & 1 for bit in range(9)], dtype=bool).reshape(3, 3) | np.eye(3, dtype=bool)
    instance = Instance.of(draw(seed, 6))
    paths, costs = ng_paths(instance, contains, coarse=coarse), random_costs(seed, 6)

    cost, nodes_of = paths.shortest(costs)

    assert cost == pytest.approx(
        min(path_price(paths, costs, np.array(x)) for x in itertools.product(range(3), repeat=6))
    )
    if np.isfinite(cost):
        assert path_price(paths, costs, nodes_of) == pytest.approx(cost)
        assert paths.shortest(costs, cost + 1e-6)[0] == pytest.approx(cost)
        assert paths.shortest(costs, cost - 1e-6) == (cost - 1e-6, pytest.approx([]))


@given(seeds())
@examples(40)
def test_with_complete_neighbourhoods_a_path_costs_as_much_as_its_placement(seed: int) -> None:
    problem = layered_problem(seed, 5)
    instance = Instance.of(problem)
    paths = ng_paths(instance, EVERYTHING)

    for placement in itertools.product(range(3), repeat=5):
        nodes_of = np.array(placement)
        legal = not evaluate(problem, instance.placement(nodes_of)).violations
        paid = paths.queue_paid(nodes_of)
        if legal:
            assert paid == pytest.approx(instance.queue_cost(instance.loads(nodes_of)), rel=1e-9)
        elif np.isfinite(instance.path_cost(nodes_of)):
            assert np.isinf(paid).any()


@given(seeds())
@examples(40)
def test_coarse_states_only_make_paths_cheaper(seed: int) -> None:
    instance = Instance.of(layered_problem(seed))
    exact, coarse = ng_paths(instance, EVERYTHING), ng_paths(instance, EVERYTHING, coarse=True)

    for placement in itertools.product(range(3), repeat=6):
        nodes_of = np.array(placement)
        assert (coarse.queue_paid(nodes_of) <= exact.queue_paid(nodes_of) * (1 + 1e-9)).all()


@given(seeds())
@examples(40)
def test_merged_kinds_of_atoms_only_make_paths_cheaper(seed: int) -> None:
    instance = Instance.of(tiny_problem(seed, 6))
    exact = ng_paths(instance, EVERYTHING)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(states_module, "MAX_STATES", 20)
        merged = ng_paths(instance, EVERYTHING)

    for placement in itertools.product(range(3), repeat=6):
        nodes_of = np.array(placement)
        assert (merged.queue_paid(nodes_of) <= exact.queue_paid(nodes_of) * (1 + 1e-9)).all()


@given(seeds())
@examples(40)
def test_the_load_and_memory_of_a_state_are_at_most_those_of_its_atoms(seed: int) -> None:
    instance = Instance.of(layered_problem(seed))
    states = NodeStates.of(instance)
    coarse, of_atom = states.coarse(instance), np.diff(states.before)

    for chosen in itertools.product([False, True], repeat=6):
        held = np.array(chosen)
        state = of_atom[held].sum()
        load = np.where(np.isfinite(instance.load[held]), instance.load[held], np.inf).sum(axis=0)
        held_bytes = float(instance.memory[held].sum())
        for kind, number in ((states, state), (coarse, coarse.after(state, 0, 0, held_bytes))):
            assert kind.memory[number] <= held_bytes
            assert (kind.load[number] <= load).all()


def test_pricing_with_too_many_labels_proves_nothing() -> None:
    instance = Instance.of(layered_problem(1))

    cost, nodes_of = ng_paths(instance, EVERYTHING, max_labels=5).shortest(random_costs(1, 6))

    assert cost == -np.inf
    assert not len(nodes_of)


def test_pricing_beyond_its_budget_proves_nothing() -> None:
    instance = Instance.of(layered_problem(1, 20))
    paths, costs = ng_paths(instance, EVERYTHING), random_costs(1, 20)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(labels_module, "CHUNK", 1)
        late = paths.shortest(costs, budget=Budget(0.0))

    assert late == (-np.inf, pytest.approx([]))
    assert paths.shortest(costs)[0] > -np.inf


def test_a_cycle_is_found_until_it_is_excluded() -> None:
    instance = Instance.of(layered_problem(1))
    solution = [(1.0, np.array([0, 0, 1, 2, 0, 0]))]

    found = find_cycles(instance, solution, Neighbourhoods.of(3), value=1.0)

    assert [(cycle.node, cycle.between) for cycle in found] == [(0, (1, 2))]
    assert not find_cycles(instance, solution, Neighbourhoods.of(3).extended(found), value=1.0)
    assert len(find_cycles(instance, solution, Neighbourhoods.of(3).extended([Cycle(0, (1,), 1.0)]), value=1.0)) == 1
