"""Plans of the controller's own, made under the rules that hold now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resplit.config import ClusterConfig
from resplit.control.planning import load_problem, plan_without, save_problem, under_rules, without
from resplit.model.source import StoredModel
from resplit.types import Problem
from tests.support.latest_problem import problem_of

A, B, C = "alpha", "beta", "gamma"
TODAY = (A, A, B, B, C, C, B, A)


@pytest.fixture
def problem(stored_model: StoredModel) -> Problem:
    cluster = ClusterConfig.model_validate(
        {
            "name": "test",
            "source": A,
            "trusted": [A, B],
            "nodes": [{"name": name, "memory": "8 MiB"} for name in (A, B, C)],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "kv_tokens": 64,
        }
    )
    return problem_of(cluster, stored_model.features(1), TODAY)


def test_a_node_that_may_not_be_used_gets_nothing_and_keeps_its_links(problem: Problem) -> None:
    for unused in (A, B, C):
        assert unused not in (plan_without(problem, [unused], TODAY).placement or ())
    beside = without(problem, [A])
    assert np.isnan(beside.decode_s_per_token[:, 0]).all()
    assert np.array_equal(beside.link_latency_s, problem.link_latency_s, equal_nan=True)


def test_a_plan_keeps_the_rules_of_now_and_not_those_of_the_latest_problem(problem: Problem) -> None:
    strict = under_rules(problem, [B], problem.blocks)
    placement = plan_without(strict, [], TODAY).placement
    assert placement is not None
    assert {placement[block] for block in (0, 1, 7)} == {B}
    nobody = plan_without(under_rules(problem, [], problem.blocks), [], TODAY)
    assert nobody.placement is None
    assert nobody.reason


def test_the_latest_problem_survives_a_restart(problem: Problem, tmp_path: Path) -> None:
    assert load_problem(tmp_path / "latest_problem.json") is None
    save_problem(problem, tmp_path / "latest_problem.json")
    kept = load_problem(tmp_path / "latest_problem.json")
    assert kept is not None
    assert (kept.blocks, kept.nodes, kept.current) == (
        problem.blocks,
        problem.nodes,
        problem.current,
    )
