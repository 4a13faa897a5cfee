"""Simulated annealing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from resplit.planner.budget import Budget
from resplit.planner.evaluate import block_bytes
from resplit.planner.instance import Instance
from resplit.planner.search.annealing import Annealing
from tests.support.problems import best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples


def annealed(instance: Instance, steps: int, seed: int = 0) -> float:
    """The best objective after `steps` budget steps, starting with all atoms on node 0."""
    annealing, budget = Annealing(instance, 1.0, seed), Budget(0.0, steps)
    best, here = float("inf"), np.zeros(instance.shape[0], np.intp)
    while not budget.spent:
        here, found = annealing.run(here, best, budget)
        best = min(best, instance.cost(found) if found is not None else float("inf"))
    return best


@given(seeds())
@examples(25)
def test_annealing_finds_the_optimum_of_enumeration(seed: int) -> None:
    problem = tiny_problem(seed, blocks=5)

    best = annealed(Instance.of(problem), steps=5)

    assert best == pytest.approx(best_by_enumeration(problem)[0], rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_annealing_finds_a_plan_if_nearly_all_memory_is_needed(seed: int) -> None:
    problem = tiny_problem(seed, blocks=14, nodes=6)
    random = np.random.default_rng(seed)
    hidden = np.sort(random.integers(0, 6, 14))
    memory = 1.03 * np.bincount(hidden, block_bytes(problem), 6)
    everywhere = np.full((14, 6), 1e-4)
    scarce = replace(
        problem,
        nodes=tuple(
            replace(n, memory_bytes=float(m), trusted=True) for n, m in zip(problem.nodes, memory, strict=True)
        ),
        prefill_s_per_token=everywhere,
        decode_s_per_token=everywhere,
        link_latency_s=np.full((6, 6), 1e-3),
        link_bandwidth_bytes_per_s=np.full((6, 6), 1e8),
    )

    assert annealed(Instance.of(scarce), steps=150) < float("inf")


def test_the_same_steps_and_seed_give_the_same_plan() -> None:
    instance = Instance.of(tiny_problem(7, blocks=20, nodes=8))

    assert annealed(instance, steps=6, seed=3) == annealed(instance, steps=6, seed=3)


def test_a_run_ends_when_its_budget_is_spent() -> None:
    instance = Instance.of(tiny_problem(7, blocks=20, nodes=8))
    annealing = Annealing(instance, 1.0)
    budget = Budget(0.05)

    for _ in range(20):
        annealing.run(np.zeros(20, np.intp), float("inf"), budget)

    assert budget.elapsed_s < 1.0
