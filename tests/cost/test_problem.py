"""The placement problem from the cost model and the present state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from resplit.config import ClusterConfig
from resplit.cost import CostModel, NodeState, node_states, problem_from
from resplit.cost.per_token import _least_squares
from resplit.planner import solve
from resplit.problem import problem_from_json, problem_to_json
from resplit.telemetry import NODE_COLUMNS, frame
from resplit.types import BlockFeatures, Problem, RequestClass
from tests.support.telemetry import MACHINES, node_rows

CHAT = RequestClass("chat", "home-a", 0.5, 64, 32)
STATES = {name: NodeState(4e8, 0.1) for name in MACHINES}


@pytest.fixture(scope="module")
def problem(model: CostModel, features: tuple[BlockFeatures, ...], cluster: ClusterConfig) -> Problem:
    return problem_from(model, features, cluster, STATES, [CHAT], current=["home-a"] * len(features))


def test_a_request_of_the_only_class_takes_exactly_its_passes(
    problem: Problem, model: CostModel, features: tuple[BlockFeatures, ...]
) -> None:
    requests = CHAT.prompt_tokens * problem.prefill_s_per_token + CHAT.new_tokens * problem.decode_s_per_token
    for j, feature in enumerate(features):
        for i, node in enumerate(problem.nodes):
            first = model.pass_s(feature, node.name, "prefill", 64, 0)[0]
            step = model.pass_s(feature, node.name, "decode", 1, 64 + 32 / 2)[0]
            assert requests[j, i] == pytest.approx(first + 31 * step, rel=1e-5)


@settings(max_examples=200)
@given(data=st.data(), classes=st.integers(1, 4))
def test_times_per_token_are_never_negative_and_fit_no_worse_than_the_pass_times(
    data: st.DataObject, classes: int
) -> None:
    sizes = st.lists(st.integers(1, 2000), min_size=classes, max_size=classes)
    prompt, new = (np.array(data.draw(sizes), dtype=float) for _ in range(2))
    fixed, token, step = (data.draw(st.floats(1e-5, 1e-1)) for _ in range(3))
    request = (fixed + token * prompt + (new - 1) * step)[:, None, None]
    rate = np.ones(classes)
    prefill, decode = _least_squares(prompt, new, rate, request, np.array([[step]]))

    def misfit(p: float, d: float) -> float:
        return float(np.sum((prompt * p + new * d - request[:, 0, 0]) ** 2 / request[:, 0, 0] ** 2))

    assert prefill.item() >= 0
    assert decode.item() >= 0
    assert misfit(prefill.item(), decode.item()) <= misfit(token, step) + 1e-4
    if classes == 1:
        assert misfit(prefill.item(), decode.item()) < 1e-8


def test_nodes_and_trust_come_from_the_cluster_and_links_from_the_model(
    problem: Problem, cluster: ClusterConfig
) -> None:
    assert [node.name for node in problem.nodes] == cluster.node_names
    assert [node.trusted for node in problem.nodes] == [True, True, False, False]
    assert problem.link_latency_s[0, 1] == pytest.approx(0.003, rel=0.1)
    assert problem.link_bandwidth_bytes_per_s[0, 1] == pytest.approx(2e7, rel=0.1)
    assert np.isnan(np.diag(problem.link_latency_s)).all()
    assert problem.kv_tokens == 2048
    assert problem.current == ("home-a",) * len(problem.blocks)


def test_the_problem_is_valid_in_its_format_and_can_be_planned(
    model: CostModel, features: tuple[BlockFeatures, ...], cluster: ClusterConfig
) -> None:
    problem = problem_from(model, features, cluster, STATES, [CHAT], lost_nodes=["edge"])
    again = problem_from_json(problem_to_json(problem))
    np.testing.assert_array_equal(again.decode_s_per_token, problem.decode_s_per_token)
    plan = solve(again, time_limit_s=2.0)
    assert plan.placement is not None
    assert "edge" not in plan.placement


@pytest.mark.parametrize("why", ["lost", "silent"])
def test_a_lost_or_silent_node_stays_in_the_problem_with_all_times_null(
    model: CostModel, features: tuple[BlockFeatures, ...], cluster: ClusterConfig, why: str
) -> None:
    states = {name: state for name, state in STATES.items() if why == "lost" or name != "edge"}
    lost = ["edge"] if why == "lost" else []
    problem = problem_from(model, features, cluster, states, [CHAT], lost_nodes=lost)
    edge = problem.node_index("edge")
    for times in (problem.prefill_s_per_token[:, edge], problem.decode_s_per_token[:, edge]):
        assert np.isnan(times).all()
    for matrix in (problem.link_latency_s, problem.link_bandwidth_bytes_per_s):
        assert np.isnan(matrix[edge]).all()
        assert np.isnan(matrix[:, edge]).all()
    assert np.isfinite(np.delete(problem.prefill_s_per_token, edge, axis=1)).all()


def test_a_state_is_free_plus_held_memory_and_the_use_by_others() -> None:
    rows = node_rows(MACHINES, [0.0, 1.0, 2.0])
    rows[4]["cpu_utilization"] = 1.0  # one odd report of home-a
    state = node_states(frame(rows, NODE_COLUMNS))["home-a"]
    assert state == NodeState(1.5e8, pytest.approx(0.2))


def test_a_background_of_a_whole_node_is_clipped_and_logged() -> None:
    rows = [row | {"cpu_utilization": 1.0, "own_utilization": 0.0} for row in node_rows(MACHINES, [0.0])]
    with capture_logs() as logs:
        assert node_states(frame(rows, NODE_COLUMNS))["edge"].background_utilization == 0.99
    assert ("background utilization clipped", "edge") in {(log["event"], log["node"]) for log in logs}


def test_own_use_above_the_total_does_not_give_a_negative_background() -> None:
    rows = [row | {"cpu_utilization": 0.3, "own_utilization": 0.32} for row in node_rows(MACHINES, [0.0])]
    assert node_states(frame(rows, NODE_COLUMNS))["edge"].background_utilization == 0.0
