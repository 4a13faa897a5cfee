"""The Lagrangian bound, its resources and its set cuts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.planner.bound.convex import relax_convex
from resplit.planner.bound.dual import Dual, Prices
from resplit.planner.bound.node_states import NodeStates
from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.bound.resources import Resources, SetCuts, Support
from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate
from resplit.planner.instance import Instance
from resplit.problem import read_problem
from tests.support.problems import EXAMPLES, best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples


@given(seeds(), st.floats(0, 1), st.floats(0, 50), st.floats(0, 5))
@examples(30)
def test_any_prices_bound_the_optimum_from_below(seed: int, share: float, load: float, resource: float) -> None:
    problem = tiny_problem(seed, blocks=4)
    instance = Instance.of(problem)
    optimum, placement = best_by_enumeration(problem)
    if placement is None:
        return
    resources = Resources.of(instance)
    rng = np.random.default_rng(seed)
    prices = Prices(
        share * rng.random(3),
        load * rng.random(3),
        resource * rng.random(resources.limit.shape),
        np.zeros(0),
        rng.random(3) / 6,
    )

    value, _ = Dual(instance, IntervalPaths(instance), resources).evaluate(prices)

    assert value <= optimum * (1 + 1e-9)


@pytest.mark.parametrize(
    "name",
    ["n006-llama3.2-1b-c2-12", "n008-llama2-7b-c1-13", "n012-llama3.2-3b-c2-15",
     "n005-llama3.2-1b-c2-batch-31", "n008-llama2-7b-c2-batch-32"],
)  # fmt: skip
def test_the_prices_of_the_convex_relaxation_prove_its_value(name: str) -> None:
    instance = Instance.of(read_problem(EXAMPLES / f"{name}.json"))
    unit = instance.memory.mean()
    memory = Resources(instance.memory[None] / unit, instance.memory_limit[None] / unit, np.array([unit]))
    relaxation = relax_convex(instance)
    assert relaxation is not None

    value, _ = Dual(instance, IntervalPaths(instance), memory).evaluate(relaxation.prices)

    assert value == pytest.approx(relaxation.value, rel=1e-6)


@pytest.mark.parametrize("name", ["n006-llama3.2-3b-c1-tight-18", "n008-llama2-7b-c1-13", "n008-llama2-7b-c3-14"])
def test_column_generation_gives_a_higher_bound_than_the_convex_relaxation(name: str) -> None:
    instance = Instance.of(read_problem(EXAMPLES / f"{name}.json"))
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    relaxation = relax_convex(instance)
    assert relaxation is not None

    dual.generate_columns([], Budget(20.0), float("inf"))

    assert dual.bound > relaxation.value * 1.05


@given(seeds(), st.booleans())
@examples(40)
def test_no_legal_placement_violates_the_limits_of_node_states(seed: int, alike: bool) -> None:
    problem = tiny_problem(seed, blocks=5)
    if alike:  # all blocks but the first are of one kind
        block = problem.blocks[1]
        blocks = (problem.blocks[0], *(replace(block, name=f"block-{j}") for j in range(1, 5)))
        times = {name: np.vstack((t[:1], *[t[1:2]] * 4)) for name, t in (
            ("prefill_s_per_token", problem.prefill_s_per_token), ("decode_s_per_token", problem.decode_s_per_token)
        )}  # fmt: skip
        problem = replace(problem, blocks=blocks, **times)
    instance = Instance.of(problem)
    plain = Resources.of(instance)
    sharp = plain.tightened(instance, NodeStates.of(instance))

    assert (sharp.limit[: len(plain.limit)] <= plain.limit * (1 + 1e-9)).all()
    for placement in itertools.product(range(3), repeat=5):
        nodes_of = np.array(placement)
        if not evaluate(problem, instance.placement(nodes_of)).violations:
            assert (Support.of(sharp, nodes_of).used <= sharp.limit).all()


@given(seeds())
@examples(30)
def test_every_legal_placement_satisfies_every_set_cut(seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    instance = Instance.of(problem)
    resources = Resources.of(instance)
    members = np.array(list(itertools.product([0.0, 1.0], repeat=3))[1:])
    masks = np.repeat(members, len(resources.use), axis=0)
    kinds = np.tile(np.arange(len(resources.use)), len(members))
    cuts = SetCuts.of(masks, kinds, (masks * resources.limit[kinds]).sum(axis=1))

    for placement in itertools.product([node.name for node in problem.nodes], repeat=4):
        if not evaluate(problem, placement).violations:
            nodes_of = instance.nodes_of(placement)
            assert (cuts.excess(Support.of(resources, nodes_of)) <= 1e-9).all()


@given(seeds())
@examples(30)
def test_every_legal_placement_satisfies_the_entry_cuts(seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    instance = Instance.of(problem)
    resources = Resources.of(instance).tightened(instance, NodeStates.of(instance))
    start = Support.of(resources, np.random.default_rng(seed).integers(0, 3, 4))
    forbidden = np.arange(3) == seed % 4  # or none

    cuts = SetCuts.violated_entry_cuts(resources, start, set(), forbidden)

    assert (cuts.excess(start) > 0).all()
    for placement in itertools.product([node.name for node in problem.nodes], repeat=4):
        nodes_of = instance.nodes_of(placement)
        if not evaluate(problem, placement).violations and not forbidden[nodes_of].any():
            assert (cuts.excess(Support.of(resources, nodes_of)) <= 1e-9).all()


@given(seeds())
@examples(30)
def test_growing_neighbourhoods_raise_the_bound_but_not_above_the_optimum(seed: int) -> None:
    problem = tiny_problem(seed, blocks=5)
    instance = Instance.of(problem)
    optimum, placement = best_by_enumeration(problem)
    if placement is None:
        return
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))
    bounds = []

    dual.generate_columns([], Budget(5.0), float("inf"))
    bounds.append(dual.bound)
    while dual.grow_neighbourhoods():
        dual.generate_columns([], Budget(5.0), float("inf"))
        bounds.append(dual.bound)

    assert bounds == sorted(bounds)
    assert bounds[-1] <= optimum * (1 + 1e-9)


def test_no_master_is_set_up_after_the_time_limit() -> None:
    instance = Instance.of(tiny_problem(2, blocks=5))
    dual = Dual(instance, IntervalPaths(instance), Resources.of(instance))

    assert dual.generate_columns([], Budget(0.0), float("inf")) == []

    assert dual.bound == -np.inf
    assert dual.solution == []
