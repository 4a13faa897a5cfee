"""Repeated planning of a drifting state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.planner import solve
from resplit.planner.evaluate import evaluate
from resplit.planner.replan import Replanner
from resplit.problem import read_problem
from resplit.types import Problem
from tests.support.problems import EXAMPLES


def drifted(problem: Problem, seed: int) -> Problem:
    random = np.random.default_rng(seed)
    return replace(
        problem,
        nodes=tuple(
            replace(
                n,
                background_utilization=float(np.clip(n.background_utilization + random.normal(0, 0.05), 0, 0.9)),
                load_share=n.load_share * (1 if n.load_share == 1 else float(random.uniform(0.7, 1.0))),
            )
            for n in problem.nodes
        ),
        classes=tuple(replace(c, rate_rps=c.rate_rps * float(random.uniform(0.9, 1.1))) for c in problem.classes),
    )


@pytest.mark.parametrize(
    ("name", "seed"),
    [("n012-llama3.2-3b-c2-15", 1), ("n012-llama3.2-3b-c2-15", 2), ("n012-llama3.2-3b-c2-15", 3),
     ("n008-llama2-7b-c2-batch-32", 1), ("n004-llama3.2-3b-c1-batch-tight-cuts-54", 1)],
)  # fmt: skip
def test_a_drifted_state_is_planned_as_well_as_from_scratch(name: str, seed: int) -> None:
    problem = read_problem(EXAMPLES / f"{name}.json")
    replanner = Replanner(problem, time_limit_s=2.0)
    state = drifted(problem, seed)

    plan = replanner.solve(state, time_limit_s=1.0)

    fresh = solve(state, time_limit_s=5.0)
    assert plan.placement is not None
    assert evaluate(state, plan.placement).violations == ()
    assert plan.objective is not None
    assert plan.lower_bound is not None
    assert fresh.objective is not None
    assert plan.objective <= fresh.objective * 1.005
    assert plan.lower_bound <= fresh.objective * (1 + 1e-9)


def test_the_replanner_plans_without_a_removed_node() -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c1-13.json")
    replanner = Replanner(problem, time_limit_s=2.0)
    assert replanner.plan.placement is not None
    gone = problem.node_index(replanner.plan.placement[-1])
    if problem.classes[0].source == problem.nodes[gone].name:
        gone = problem.node_index(replanner.plan.placement[0])
    kept = [i for i in range(len(problem.nodes)) if i != gone]
    smaller = replace(
        problem,
        nodes=tuple(problem.nodes[i] for i in kept),
        prefill_s_per_token=problem.prefill_s_per_token[:, kept],
        decode_s_per_token=problem.decode_s_per_token[:, kept],
        link_latency_s=problem.link_latency_s[np.ix_(kept, kept)],
        link_bandwidth_bytes_per_s=problem.link_bandwidth_bytes_per_s[np.ix_(kept, kept)],
    )

    plan = replanner.solve(smaller, time_limit_s=2.0)

    assert plan.placement is not None
    assert problem.nodes[gone].name not in plan.placement


@pytest.mark.parametrize("seed", range(4))
def test_the_last_set_cuts_are_kept_if_the_last_prices_prove_little(seed: int) -> None:
    problem = read_problem(EXAMPLES / "n008-llama2-7b-c2-tight-nulls-19.json")
    replanner = Replanner(problem, time_limit_s=0.5)
    state = replace(
        drifted(problem, seed),
        link_latency_s=problem.link_latency_s * 0.1,
        link_bandwidth_bytes_per_s=problem.link_bandwidth_bytes_per_s * 10,
    )

    plan = replanner.solve(state, time_limit_s=0.5)

    assert plan.placement is not None
    assert evaluate(state, plan.placement).violations == ()
