"""The solvers `relax` and `exact`: plans are legal, bounds are proven, and known optima are reached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from resplit.errors import ConfigError
from resplit.planner import solve
from resplit.planner.evaluate import evaluate
from resplit.problem import read_problem
from resplit.types import Problem
from tests.support.problems import EVERY_EXAMPLE, EXAMPLES, best_by_enumeration, seeds, tiny_problem
from tests.support.properties import examples


@pytest.mark.parametrize("path", EVERY_EXAMPLE, ids=lambda path: path.stem)
def test_the_plan_of_an_example_is_legal_and_reaches_its_known_optimum(path: Path) -> None:
    known = json.loads(path.read_text())["known"]
    problem = read_problem(path)

    plan = solve(problem, work_limit=25)

    if known["placement"] is None:
        assert plan.status == "infeasible"
        assert plan.placement is None
        return
    assert plan.placement is not None
    assert plan.objective is not None
    assert plan.lower_bound is not None
    evaluation = evaluate(problem, plan.placement)
    assert evaluation.violations == ()
    assert evaluation.objective == pytest.approx(plan.objective, rel=1e-9)
    assert plan.lower_bound <= known["objective"] * (1 + 1e-9)
    assert plan.objective == pytest.approx(known["objective"], rel=1e-3)
    assert plan.utilization == pytest.approx(
        dict(zip([node.name for node in problem.nodes], evaluation.utilization, strict=True))
    )


@given(seeds())
@examples(40)
def test_exact_finds_the_optimum_of_enumeration(seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    optimum, placement = best_by_enumeration(problem)

    plan = solve(problem, solver="exact", time_limit_s=20.0)

    if placement is None:
        assert plan.status == "infeasible"
        assert plan.reason
        return
    assert plan.objective == pytest.approx(optimum, rel=2e-6)
    assert plan.lower_bound is not None
    assert plan.lower_bound <= optimum * (1 + 1e-9)


@given(seeds())
@examples(40)
def test_the_bound_is_below_the_optimum_and_the_objective_is_not(seed: int) -> None:
    problem = tiny_problem(seed, blocks=4)
    optimum, placement = best_by_enumeration(problem)

    plan = solve(problem, time_limit_s=5.0)

    if placement is None:
        assert plan.status == "infeasible"
        return
    assert plan.lower_bound is not None
    assert plan.objective is not None
    assert plan.lower_bound <= optimum * (1 + 1e-9)
    assert plan.objective >= optimum * (1 - 1e-9)


@given(seeds())
@examples(15)
def test_more_memory_never_raises_the_optimum(seed: int) -> None:
    problem = tiny_problem(seed)
    richer = replace(problem, nodes=tuple(replace(n, memory_bytes=n.memory_bytes * 1.3) for n in problem.nodes))

    before, after = (solve(p, solver="exact", time_limit_s=20.0) for p in (problem, richer))

    if before.objective is not None:
        assert after.objective is not None
        assert after.objective <= before.objective * (1 + 2e-6)


@given(seeds())
@examples(15)
def test_relabelling_nodes_changes_nothing(seed: int) -> None:
    problem = tiny_problem(seed)
    order = np.random.default_rng(seed).permutation(len(problem.nodes))
    shuffled = replace(
        problem,
        nodes=tuple(problem.nodes[i] for i in order),
        prefill_s_per_token=problem.prefill_s_per_token[:, order],
        decode_s_per_token=problem.decode_s_per_token[:, order],
        link_latency_s=problem.link_latency_s[np.ix_(order, order)],
        link_bandwidth_bytes_per_s=problem.link_bandwidth_bytes_per_s[np.ix_(order, order)],
    )

    plan, other = (solve(p, solver="exact", time_limit_s=20.0) for p in (problem, shuffled))

    assert plan.status == other.status
    if plan.objective is not None:
        assert other.objective == pytest.approx(plan.objective, rel=2e-6)


@given(seeds())
@examples(15)
def test_scaling_time_units_scales_the_latency_and_nothing_else(seed: int) -> None:
    problem = tiny_problem(seed)
    factor = 1000.0
    scaled = replace(
        problem,
        classes=tuple(replace(c, rate_rps=c.rate_rps / factor) for c in problem.classes),
        prefill_s_per_token=problem.prefill_s_per_token * factor,
        decode_s_per_token=problem.decode_s_per_token * factor,
        link_latency_s=problem.link_latency_s * factor,
        link_bandwidth_bytes_per_s=problem.link_bandwidth_bytes_per_s / factor,
        weights=replace(
            problem.weights, latency=problem.weights.latency / factor, energy=problem.weights.energy / factor
        ),
    )

    plan, other = (solve(p, solver="exact", time_limit_s=20.0) for p in (problem, scaled))

    assert plan.status == other.status
    if plan.terms is not None and plan.placement is not None:
        terms = evaluate(scaled, plan.placement).terms
        assert terms.latency_s == pytest.approx(factor * plan.terms.latency_s)
        assert terms.energy_j == pytest.approx(factor * plan.terms.energy_j)
        assert (terms.balance, terms.privacy) == pytest.approx((plan.terms.balance, plan.terms.privacy))
        assert other.objective == pytest.approx(plan.objective, rel=2e-6)


def test_fixed_cuts_cost_no_less_than_free_ones() -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c1-13.json")
    fixed = replace(problem, allowed_cuts=frozenset({8, 16, 24}))

    plan, other = solve(problem, time_limit_s=5.0), solve(fixed, time_limit_s=5.0)

    assert plan.objective is not None
    assert other.objective is not None
    assert plan.objective <= other.objective
    assert {segment.first for segment in other.segments} <= {0, 8, 16, 24}


def test_a_lost_node_is_never_used() -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c1-13.json")
    plan = solve(problem, time_limit_s=2.0)
    lost = problem.node_index(plan.segments[0].node)
    prefill, decode = problem.prefill_s_per_token.copy(), problem.decode_s_per_token.copy()
    prefill[:, lost] = decode[:, lost] = np.nan
    survivors = replace(problem, prefill_s_per_token=prefill, decode_s_per_token=decode, current=plan.placement)

    after = solve(survivors, time_limit_s=2.0)

    assert after.placement is not None
    assert problem.nodes[lost].name not in after.placement


def test_the_same_work_limit_gives_the_same_answer() -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c3-14.json")

    first, second = (solve(problem, work_limit=150) for _ in range(2))

    assert first.placement == second.placement
    assert first.lower_bound == second.lower_bound


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory": 0.2}, "memory short by"),
        ({"trusted": False}, "no trusted node for block block-0"),
        ({"rate": 100.0}, "capacity exceeded by"),
        ({"runs": False}, "no node can run block block-2"),
        ({"block": 3}, "memory: block-3 needs"),
        ({"memory": 0.215}, "memory: counted in whole parts of 963.2 MiB"),
    ],
)
def test_an_infeasible_problem_has_a_reason(changes: dict[str, float], reason: str) -> None:
    plan = solve(infeasible(**changes))

    assert plan.status == "infeasible"
    assert plan.reason is not None
    assert plan.reason.startswith(reason)


def infeasible(
    memory: float = 1.0, trusted: bool = True, rate: float = 1.0, runs: bool = True, block: int | None = None
) -> Problem:
    problem = tiny_problem(12)
    times = np.full((5, 3), 1e-3)
    if not runs:
        times[2] = np.nan
    nodes = tuple(
        replace(node, memory_bytes=8e9 * memory, trusted=trusted and i < 2) for i, node in enumerate(problem.nodes)
    )
    blocks = tuple(
        replace(b, private=j == 0, weight_bytes=9e9 if j == block else 1e9) for j, b in enumerate(problem.blocks)
    )
    return replace(
        problem,
        nodes=nodes,
        blocks=blocks,
        classes=tuple(replace(c, rate_rps=0.1 * rate) for c in problem.classes),
        prefill_s_per_token=times,
        decode_s_per_token=times,
        link_latency_s=np.full((3, 3), 1e-3),
        link_bandwidth_bytes_per_s=np.full((3, 3), 1e7),
    )


def test_an_unknown_solver_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'best' is not one of relax"):
        solve(tiny_problem(1), solver="best")
