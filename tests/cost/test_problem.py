"""The placement problem from the cost model and the present state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from resplit.config import ClusterConfig
from resplit.cost import CostModel, LinkModel, NodeReading, PassModel, PredictionError, node_readings, problem_from
from resplit.cost.model import Phase
from resplit.cost.per_token import _least_squares, node_times
from resplit.errors import DataError
from resplit.planner import solve
from resplit.problem import problem_from_json, problem_to_json
from resplit.telemetry.tables import NODE_COLUMNS, frame
from resplit.types import BlockFeatures, Problem, RequestClass
from tests.support.telemetry import MACHINES, node_rows

CHAT = RequestClass("chat", "home-a", 0.5, 64, 32)
STATES = {name: NodeReading(4e8, 0.1) for name in MACHINES}


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
    state = node_readings(frame(rows, NODE_COLUMNS))["home-a"]
    assert state == NodeReading(1.5e8, pytest.approx(0.2))


def test_a_background_of_a_whole_node_is_clipped_and_logged() -> None:
    rows = [row | {"cpu_utilization": 1.0, "own_utilization": 0.0} for row in node_rows(MACHINES, [0.0])]
    with capture_logs() as logs:
        assert node_readings(frame(rows, NODE_COLUMNS))["edge"].background_utilization == 0.99
    assert ("background utilization clipped", "edge") in {(log["event"], log["node"]) for log in logs}


def test_own_use_above_the_total_does_not_give_a_negative_background() -> None:
    rows = [row | {"cpu_utilization": 0.3, "own_utilization": 0.32} for row in node_rows(MACHINES, [0.0])]
    assert node_readings(frame(rows, NODE_COLUMNS))["edge"].background_utilization == 0.0


def _per_token(prompt: list[float], new: list[float], rate: list[float], request_s: list[float]) -> tuple[float, float]:
    """Prefill and decode seconds per token of one block on one node, with a decode step of 5 s as the last resort."""
    prefill, decode = _least_squares(
        np.array(prompt), np.array(new), np.array(rate), np.array(request_s)[:, None, None], np.array([[5.0]])
    )
    return prefill.item(), decode.item()


def test_two_classes_with_consistent_times_determine_both_times_per_token() -> None:
    assert _per_token([10, 20], [4, 2], [1, 3], [10 * 0.5 + 4 * 2, 20 * 0.5 + 2 * 2]) == pytest.approx(
        (0.5, 2), rel=1e-4
    )


def test_times_of_milliseconds_have_the_same_relative_errors_as_times_of_seconds() -> None:
    prompt, new, rate = [10.0, 20.0, 30.0], [4.0, 2.0, 9.0], [1.0, 3.0, 0.5]
    seconds = _per_token(prompt, new, rate, [13.0, 15.0, 30.0])
    milliseconds = _per_token(prompt, new, rate, [0.013, 0.015, 0.030])
    assert milliseconds == pytest.approx([value / 1000 for value in seconds], rel=0.01)


def test_one_class_takes_exactly_its_time_with_the_decode_step_as_given() -> None:
    assert _per_token([10], [4], [0.3], [26.0]) == pytest.approx((0.6, 5.0), rel=1e-3)


def test_inconsistent_times_have_the_least_relative_error_weighted_by_rate() -> None:
    prompt, new, rate, request_s = [10.0, 20.0, 30.0], [4.0, 2.0, 9.0], [1.0, 3.0, 0.5], [13.0, 15.0, 30.0]
    weight = np.sqrt(rate) / np.array(request_s)
    rows = np.column_stack([prompt, new]) * weight[:, None]
    expected = np.linalg.lstsq(rows, weight * request_s, rcond=None)[0]
    assert (expected > 0).all()
    assert _per_token(prompt, new, rate, request_s) == pytest.approx(expected, rel=1e-4)


def test_a_time_that_would_be_negative_is_zero_and_the_other_is_fitted_alone() -> None:
    sizes, ones, request_s = [10.0, 20.0], [1.0, 1.0], [30.0, 3.0]  # the longer prompt takes the shorter time
    alone = (1 / 30 + 1 / 3) / (1 / 30**2 + 1 / 3**2)  # the least relative error, sum(x) / sum(x^2) with x = 1 / S
    assert _per_token(sizes, ones, [2.0, 2.0], request_s) == pytest.approx((0.0, alone), rel=1e-6)
    assert _per_token(ones, sizes, [2.0, 2.0], request_s) == pytest.approx((alone, 0.0), rel=1e-6)


def _pass(node: str | None, phase: Phase, kind: str, constant_s: float, per_token_s: float) -> PassModel:
    return PassModel(node, phase, kind, (constant_s, per_token_s, 0.0, 0.0, 0.0), (0.0,) * 5, 1, 0.0)


NOT_JUDGED = PredictionError(None, None, 0)
PHASES: tuple[Phase, ...] = ("prefill", "decode")
SMALL = CostModel(
    fitted_at_s=0.0,
    reference_s={"home-a": 1.0, "home-b": 1.0, "edge": 1.0},
    passes=(
        *(_pass(None, phase, "layer", 1.0, 1.0) for phase in PHASES),
        _pass("home-a", "prefill", "layer", 0.5, 0.25),
        _pass("home-a", "decode", "layer", 2.0, 1.0),
    ),
    links=(LinkModel("home-a", "home-b", 0.1, 0.5, 0.0, 0.0, 1), LinkModel("home-b", "home-a", 0.2, 0.25, 0.0, 0.0, 1)),
    held_out_contexts=NOT_JUDGED,
    held_out_nodes=NOT_JUDGED,
)
LAYER = BlockFeatures("layer.0", "layer", 1, 0.0, 0.0, 8.0, 2.0, 4.0, True, 0.5)


def test_power_and_the_weight_of_energy_come_from_the_cluster(cluster: ClusterConfig) -> None:
    nodes = tuple(node.model_copy(update={"compute_w": 10.0 + i}) for i, node in enumerate(cluster.nodes))
    objective = cluster.objective.model_copy(update={"energy": 0.5})
    powered = cluster.model_copy(update={"nodes": nodes, "objective": objective})
    posed = problem_from(SMALL, [LAYER], powered, STATES, [CHAT])
    assert [node.compute_w for node in posed.nodes] == [10.0, 11.0, 12.0, 13.0]
    assert posed.weights.energy == 0.5
    assert all(node.compute_w == 0 for node in problem_from(SMALL, [LAYER], cluster, STATES, [CHAT]).nodes)


def test_one_class_without_requests_counts_as_one_with_some() -> None:
    for rate_rps in (0.0, 0.5):
        times = node_times(SMALL, [LAYER], ["home-a", "stranger"], [RequestClass("c", "home-a", rate_rps, 8, 4)])
        prefill, decode = times.prefill_s_per_token, times.decode_s_per_token
        # One prefill pass of 0.5 + 8 * 0.25 s and three decode passes of 3 s; the decode step decides what is open.
        assert 8 * prefill[0, 0] + 4 * decode[0, 0] == pytest.approx(2.5 + 3 * 3)
        assert decode[0, 0] == pytest.approx(2.875, rel=0.05)
        assert np.isnan(prefill[0, 1])
        assert np.isnan(decode[0, 1])


def test_a_kind_to_which_the_model_was_not_fitted_is_a_data_error() -> None:
    head = replace(LAYER, name="head", kind="head")
    with pytest.raises(DataError, match="'head'"):
        node_times(SMALL, [LAYER, head], ["home-a"], [CHAT])


def test_a_link_has_the_values_of_its_direction_and_one_that_was_not_seen_has_none(cluster: ClusterConfig) -> None:
    posed = problem_from(SMALL, [LAYER], cluster, STATES, [CHAT])
    a, b, edge = (posed.node_index(name) for name in ("home-a", "home-b", "edge"))
    assert (posed.link_latency_s[a, b], posed.link_latency_s[b, a]) == (0.1, 0.2)
    assert (posed.link_bandwidth_bytes_per_s[a, b], posed.link_bandwidth_bytes_per_s[b, a]) == (2.0, 4.0)
    assert np.isnan(posed.link_latency_s[a, edge])
    assert posed.current is None
    assert posed.allowed_cuts is None


def test_a_link_that_was_seen_in_one_direction_only_is_symmetric(cluster: ClusterConfig) -> None:
    for link in SMALL.links:
        posed = problem_from(replace(SMALL, links=(link,)), [LAYER], cluster, STATES, [CHAT])
        a, b = posed.node_index("home-a"), posed.node_index("home-b")
        assert posed.link_latency_s[a, b] == posed.link_latency_s[b, a] == link.latency_s
        assert posed.link_bandwidth_bytes_per_s[a, b] == posed.link_bandwidth_bytes_per_s[b, a]


def test_a_node_has_its_reported_state_or_else_its_configured_memory(cluster: ClusterConfig) -> None:
    states = {"home-a": NodeReading(3e8, 0.25), "home-b": NodeReading(2e8, 0.5)}
    posed = problem_from(SMALL, [LAYER], cluster, states, [CHAT], allowed_cuts=frozenset({1}))
    assert [node.memory_bytes for node in posed.nodes] == [3e8, 2e8, 400 * 2**20, 400 * 2**20]
    assert [node.background_utilization for node in posed.nodes] == [0.25, 0.5, 0.0, 0.0]
    assert [node.max_utilization for node in posed.nodes] == [cluster.node(n).max_utilization for n in MACHINES]
    assert posed.blocks == (LAYER.block(),)
    assert posed.classes == (CHAT,)
    assert posed.weights == cluster.objective.values()
    assert posed.allowed_cuts == {1}


def test_memory_is_that_of_the_newest_report_in_whatever_order_reports_arrive() -> None:
    rows = [
        row | {"memory_free_bytes": 1e8 + 1e7 * float(str(row["time_s"]))}
        for row in node_rows(MACHINES, [1.0, 2.0, 0.0])
    ]
    assert node_readings(frame(rows, NODE_COLUMNS))["edge"].memory_bytes == 1.7e8


def test_a_background_at_the_limit_is_not_logged_as_clipped() -> None:
    rows = [row | {"cpu_utilization": 0.99, "own_utilization": 0.0} for row in node_rows(MACHINES, [0.0])]
    with capture_logs() as logs:
        assert node_readings(frame(rows, NODE_COLUMNS))["edge"].background_utilization == 0.99
    assert logs == []
