"""The pricing of paths of intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given

from resplit.planner.bound.paths import IntervalPaths
from resplit.planner.instance import Instance
from tests.support.paths import path_price, random_costs
from tests.support.problems import seeds, tiny_problem
from tests.support.properties import examples


def all_paths(atoms: int, nodes: int = 3) -> list[np.ndarray]:
    return [np.array(x) for x in itertools.product(range(nodes), repeat=atoms)]


@given(seeds())
@examples(40)
def test_pricing_finds_the_cheapest_path_of_enumeration(seed: int) -> None:
    paths, costs = IntervalPaths(Instance.of(tiny_problem(seed, 5))), random_costs(seed, 5)

    cost, nodes_of = paths.shortest(costs)

    assert cost == pytest.approx(min(path_price(paths, costs, x) for x in all_paths(5)))
    if np.isfinite(cost):
        assert path_price(paths, costs, nodes_of) == pytest.approx(cost)


@given(seeds())
@examples(25)
def test_potentials_give_the_cheapest_path_through_each_interval(seed: int) -> None:
    paths, costs = IntervalPaths(Instance.of(tiny_problem(seed, 4))), random_costs(seed, 4)
    cheapest: dict[tuple[int, int, int], float] = {}
    for x in all_paths(4):
        ends = [0, *(np.flatnonzero(np.diff(x)) + 1), 4]
        for p, q in itertools.pairwise(ends):
            interval = int(p), int(q), int(x[p])
            cheapest[interval] = min(cheapest.get(interval, np.inf), path_price(paths, costs, x))

    of = paths.potentials(costs)

    for (p, q, i), cost in cheapest.items():
        inside = costs.share[i] * paths.queue[q][p, i] + of.prefix[q, i] - of.prefix[p, i]
        assert of.enter[p, i] + inside + of.after_leave[q, i] == pytest.approx(cost)


@given(seeds())
@examples(25)
def test_no_path_uses_a_forbidden_pair_of_atom_and_node(seed: int) -> None:
    forbidden = np.random.default_rng(seed).random((4, 3)) < 0.3
    instance, costs = Instance.of(tiny_problem(seed, 4)), random_costs(seed, 4)
    paths = IntervalPaths(instance)
    allowed = [x for x in all_paths(4) if not forbidden[np.arange(4), x].any()]

    cost, nodes_of = paths.without(forbidden).shortest(costs)

    assert cost == pytest.approx(min((path_price(paths, costs, x) for x in allowed), default=np.inf))
    assert not forbidden[np.arange(len(nodes_of)), nodes_of].any()
