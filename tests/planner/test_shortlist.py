"""Plans over a shortlist of many nodes: legal for all nodes, hardly worse, and with no bound that does not hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.planner import solve
from resplit.planner.evaluate import evaluate
from resplit.planner.shortlist import SHORTLISTED, shortlist, solve_shortlisted
from resplit.types import Problem
from tests.support.problems import tiny_problem

MANY = 80


def city(seed: int) -> Problem:
    """Many nodes on a plane: latency is distance, bandwidth is the same everywhere, each node has one speed."""
    problem, rng = tiny_problem(seed, blocks=6, nodes=MANY), np.random.default_rng(seed)
    places, speed = rng.uniform(0, 20e-3, (MANY, 2)), rng.uniform(0.2, 4, MANY)
    decode_s = np.outer(rng.uniform(0.5e-3, 1.5e-3, 6), speed)  # (blocks, nodes)
    latency_s = np.linalg.norm(places[:, None] - places[None], axis=2)  # (nodes, nodes)
    return replace(
        problem,
        prefill_s_per_token=decode_s / 10,
        decode_s_per_token=decode_s,
        link_latency_s=latency_s,
        link_bandwidth_bytes_per_s=np.full((MANY, MANY), 1e8),
        blocks=tuple(replace(block, private=False) for block in problem.blocks),
    )


def test_a_problem_of_few_nodes_is_left_alone() -> None:
    problem = tiny_problem(1)
    assert shortlist(problem) is problem
    plan = solve_shortlisted(problem, work_limit=500)
    assert plan.lower_bound == solve(problem, work_limit=500).lower_bound


def test_sources_holders_and_what_is_to_be_kept_are_on_the_list_and_slow_or_missing_nodes_are_not() -> None:
    problem = city(3)
    slow = {node.name for node in problem.nodes[40:]}
    factors = np.where([node.name in slow for node in problem.nodes], 1e3, 1.0)
    current = (problem.nodes[50].name,) * len(problem.blocks)
    posed = replace(problem, current=current, decode_s_per_token=problem.decode_s_per_token * factors)
    posed.prefill_s_per_token[:, 7] = posed.decode_s_per_token[:, 7] = np.nan
    listed = shortlist(posed, kept={problem.nodes[60].name})
    names = {node.name for node in listed.nodes}
    needed = {each.source for each in problem.classes} | {current[0], problem.nodes[60].name}
    assert needed <= names
    assert not (names - needed) & slow
    assert problem.nodes[7].name not in names - needed
    assert len(names) == SHORTLISTED
    assert listed.link_latency_s.shape == (SHORTLISTED, SHORTLISTED)


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_over_the_list_is_legal_and_hardly_worse_than_one_over_all_nodes(seed: int) -> None:
    problem = city(seed)
    plan, whole = solve_shortlisted(problem, work_limit=300), solve(problem, work_limit=300)
    assert plan.placement is not None
    assert whole.objective is not None
    found = evaluate(problem, plan.placement)
    assert not found.violations
    assert found.objective <= 1.1 * whole.objective
    assert plan.lower_bound is None


def test_where_the_list_has_no_plan_all_nodes_are_asked() -> None:
    problem = city(5)
    # The best nodes by time are too small for the head, which only one slow node can hold.
    large = replace(problem.blocks[-1], weight_bytes=1e12)
    nodes = (*problem.nodes[:-1], replace(problem.nodes[-1], memory_bytes=1e13))
    decode_s = problem.decode_s_per_token.copy()
    decode_s[:, -1] = 5e-3
    posed = replace(problem, blocks=(*problem.blocks[:-1], large), nodes=nodes, decode_s_per_token=decode_s)
    assert nodes[-1].name not in {node.name for node in shortlist(posed).nodes}
    plan = solve_shortlisted(posed, work_limit=300)
    assert plan.placement is not None
    assert plan.placement[-1] == nodes[-1].name
