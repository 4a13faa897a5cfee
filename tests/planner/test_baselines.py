"""The published planners."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from resplit.planner import SOLVERS, solve
from resplit.planner.baselines import bottleneck_dp, latency_dp, memory, uniform
from resplit.planner.budget import Budget
from resplit.planner.evaluate import evaluate
from resplit.planner.instance import Instance
from resplit.problem import read_problem
from tests.support.problems import EXAMPLES, best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples

BASELINES = [name for name in SOLVERS if name not in ("relax", "exact")]


@pytest.mark.parametrize("name", BASELINES)
@given(seed=seeds())
@examples(15)
def test_a_baseline_returns_a_legal_plan_or_a_reason(name: str, seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    optimum, _ = best_by_enumeration(problem)

    plan = solve(problem, solver=name)

    if plan.placement is None:
        assert plan.status in ("unknown", "infeasible")
        assert plan.reason
    else:
        assert evaluate(problem, plan.placement).violations == ()
        assert plan.objective is not None
        assert plan.objective >= optimum * (1 - 1e-9)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_answers_on_a_real_problem(name: str) -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c3-14.json")

    plan = solve(problem, solver=name)

    assert plan.solver == name
    assert plan.placement is not None or plan.reason


def test_greedy_and_latency_dp_find_plans_if_memory_is_ample() -> None:
    problem = read_problem(EXAMPLES / "n004-smollm2-135m-c1-11.json")

    for name in ("greedy", "latency-dp"):
        assert solve(problem, solver=name).placement is not None


def roomy_instance(seed: int, blocks: int, memory_bytes: list[float]) -> Instance:
    """A random problem with all times and links, trusted nodes and these memories."""
    problem = tiny_problem(seed, blocks, len(memory_bytes))
    nodes = tuple(
        replace(node, memory_bytes=size, trusted=True) for node, size in zip(problem.nodes, memory_bytes, strict=True)
    )
    return Instance.of(
        replace(
            problem,
            nodes=nodes,
            prefill_s_per_token=np.nan_to_num(problem.prefill_s_per_token, nan=1e-4),
            decode_s_per_token=np.nan_to_num(problem.decode_s_per_token, nan=1e-3),
            link_latency_s=np.nan_to_num(problem.link_latency_s, nan=0.02),
            link_bandwidth_bytes_per_s=np.nan_to_num(problem.link_bandwidth_bytes_per_s, nan=1e7),
        )
    )


def nodes_of(module: object, instance: Instance) -> list[int]:
    found = module.solve(instance, Budget(10.0)).nodes_of  # type: ignore[attr-defined]
    assert found is not None
    return [int(node) for node in found]


def test_uniform_gives_all_nodes_equal_numbers_of_blocks() -> None:
    assert nodes_of(uniform, roomy_instance(1, 6, [1e12] * 3)) == [0, 0, 1, 1, 2, 2]


def test_memory_splits_blocks_in_proportion_to_memory_with_the_largest_node_first() -> None:
    assert nodes_of(memory, roomy_instance(1, 8, [1e12, 5e12, 2e12])) == [1, 1, 1, 1, 1, 2, 2, 0]


@given(seed=seeds())
@examples(25)
def test_latency_dp_finds_the_least_latency_of_a_single_request(seed: int) -> None:
    instance = roomy_instance(seed, 5, [1e12] * 3)
    seconds = instance.alone_cost()

    def latency(x: tuple[int, ...]) -> float:
        hops = sum(instance.hop(b)[x[b - 1], x[b]] for b in range(1, 5) if x[b - 1] != x[b])
        return float(instance.start[x[0]] + sum(seconds[range(5), list(x)]) + hops + instance.end[x[-1]])

    found = tuple(nodes_of(latency_dp, instance))

    assert latency(found) == pytest.approx(min(map(latency, itertools.product(range(3), repeat=5))))


@given(seed=seeds())
@examples(25)
def test_bottleneck_dp_finds_the_shortest_bottleneck_of_two_nodes(seed: int) -> None:
    instance = roomy_instance(seed, 5, [1e12] * 2)
    instance = replace(instance, headroom=np.full(2, np.inf))

    def period(cut: int, first: int) -> float:
        """The slowest stage with blocks 0..cut-1 on node `first` and the rest on the other one."""
        load = instance.latency_weight * np.array(
            [
                instance.load_prefix[cut, first],
                instance.load_prefix[5, 1 - first] - instance.load_prefix[cut, 1 - first],
            ]
        )
        last = first if cut == 5 else 1 - first
        hop = instance.hop(cut)[first, 1 - first] if cut < 5 else 0.0
        return float(max(instance.start[first], *load, hop, instance.end[last]))

    found = nodes_of(bottleneck_dp, instance)
    cut = 5 - found[::-1].index(found[0])

    assert period(cut, found[0]) == pytest.approx(min(period(c, i) for c in range(1, 6) for i in range(2)))
