"""The load share of a node: the part of a request's node time that adds to the load, because sessions share passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.config import ClusterConfig
from resplit.cost import CostModel, NodeReading, PassModel, PredictionError, fit_cost_model, problem_from
from resplit.cost.per_token import node_times
from resplit.telemetry.tables import BLOCK_COLUMNS, Telemetry, frame
from resplit.types import BlockFeatures, RequestClass
from tests.support.networks import hardware, latencies, poisson
from tests.support.telemetry import MACHINES, block_rows

LAYER = BlockFeatures("layer.0", "layer", 1, 0.0, 0.0, 8.0, 0.0, 4.0, True, 0.5)
CHAT = RequestClass("chat", "home-a", 0.5, 64, 32)
TIMES = st.floats(1e-6, 1.0)
CLASSES = st.lists(
    st.builds(
        RequestClass,
        st.just("any"),
        st.just("home-a"),
        rate_rps=st.floats(1e-3, 10.0),
        prompt_tokens=st.integers(1, 500),
        new_tokens=st.integers(1, 500),
    ),
    min_size=1,
    max_size=3,
)


def model_of(fixed_s: float, session_s: float, token_s: float, prefill_fixed_s: float = 0.0) -> CostModel:
    """One node whose decode pass over n sessions takes fixed_s + n session_s, and whose prefill token takes token_s."""

    def passes(node: str | None) -> tuple[PassModel, PassModel]:
        prefill, decode = (prefill_fixed_s, token_s, 0.0, 0.0, 0.0), (fixed_s, session_s, 0.0, 0.0, 0.0)
        zeros = (0.0,) * 5
        return (
            PassModel(node, "prefill", "layer", prefill, zeros, 9, 0.0),
            PassModel(node, "decode", "layer", decode, zeros, 9, 0.0),
        )

    nothing = PredictionError(None, None, 0)
    return CostModel(0.0, {"home-a": 1.0}, (*passes(None), *passes("home-a")), (), nothing, nothing)


def share_of(model: CostModel, classes: list[RequestClass], stages: int = 1) -> float:
    return float(node_times(model, [LAYER], ["home-a"], classes, stages).load_share[0])


@given(fixed_s=TIMES, session_s=TIMES, token_s=TIMES, classes=CLASSES)
def test_a_request_loads_a_node_by_its_prefill_and_by_what_it_adds_to_each_decode_pass(
    fixed_s: float, session_s: float, token_s: float, classes: list[RequestClass]
) -> None:
    prefill_s = sum(c.rate_rps * c.prompt_tokens * token_s for c in classes)
    steps = sum(c.rate_rps * (c.new_tokens - 1) for c in classes)
    expected = (prefill_s + steps * session_s) / (prefill_s + steps * (fixed_s + session_s))
    share = share_of(model_of(fixed_s, session_s, token_s), classes)
    assert share == pytest.approx(max(expected, 1e-3), rel=1e-6)
    assert 0 < share <= 1


@given(session_s=TIMES, token_s=TIMES, classes=CLASSES)
def test_where_sessions_share_nothing_the_load_share_is_one(
    session_s: float, token_s: float, classes: list[RequestClass]
) -> None:
    assert share_of(model_of(0.0, session_s, token_s), classes) == pytest.approx(1.0)


@given(fixed_s=TIMES, session_s=TIMES, classes=CLASSES)
def test_the_load_share_does_not_change_with_the_rate_of_all_classes(
    fixed_s: float, session_s: float, classes: list[RequestClass]
) -> None:
    model = model_of(fixed_s, session_s, 1e-3)
    busier = [replace(c, rate_rps=7 * c.rate_rps) for c in classes]
    assert share_of(model, busier) == pytest.approx(share_of(model, classes))


@given(fixed_s=TIMES, session_s=TIMES, rate_rps=st.floats(1e-3, 10.0), stages=st.integers(2, 5))
def test_on_a_chain_a_session_also_waits_for_half_of_what_it_shares_with_those_that_it_finds_at_its_stage(
    fixed_s: float, session_s: float, rate_rps: float, stages: int
) -> None:
    model, classes = model_of(fixed_s, session_s, 0.0), [RequestClass("c", "home-a", rate_rps, 1, 21)]
    least, load = share_of(model, classes), rate_rps * 20 * (fixed_s + session_s) / stages
    share = share_of(model, classes, stages)
    if least * load < 1:
        sessions = 1 + load / (1 - share * load)
        assert share == pytest.approx(least + (1 - least) / 2 / sessions, rel=1e-6)
    else:  # more than a node can serve: as many sessions share as there may be
        assert share == pytest.approx(least)


def test_the_more_requests_a_chain_serves_the_more_of_a_pass_they_share() -> None:
    rates_rps = (0.0, 0.1, 1.0, 3.0, 10.0)
    model = model_of(0.010, 0.002, 0.0)
    shares = [share_of(model, [RequestClass("c", "home-a", rate, 1, 21)], stages=2) for rate in rates_rps]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx((1 + 1 / 6) / 2)  # nobody else is there
    assert shares[-1] > share_of(model, [CHAT])


def test_a_node_without_times_has_a_load_share_of_one() -> None:
    times = node_times(model_of(1.0, 0.1, 0.1), [LAYER], ["home-a", "stranger"], [CHAT])
    assert times.load_share[0] < 1
    assert times.load_share[1] == 1


def test_timings_of_shared_passes_give_the_load_share_of_every_node_in_the_problem(
    telemetry: Telemetry, features: tuple[BlockFeatures, ...], cluster: ClusterConfig
) -> None:
    machines = {name: replace(machine, constant_s=4e-3) for name, machine in MACHINES.items()}
    rows = block_rows(machines, features, contexts=(16, 48, 96, 192), shared=(4, 8) * 2)
    model = fit_cost_model(replace(telemetry, blocks=frame(rows, BLOCK_COLUMNS)), features)
    states = {name: NodeReading(4e8, 0.1) for name in machines}
    problem = problem_from(model, features, cluster, states, [CHAT])
    fast = machines["home-a"]
    prefill_s = sum(fast.seconds(feature.kind, 64, 0) for feature in features)
    step_s = sum(fast.seconds(feature.kind, 1, 80) for feature in features)
    added_s = step_s - len(features) * fast.constant_s
    expected = (prefill_s + 31 * added_s) / (prefill_s + 31 * step_s)
    assert 0.5 < expected < 0.7
    assert [node.load_share for node in problem.nodes] == pytest.approx([expected] * 4, rel=0.05)


def test_the_problem_has_the_load_shares_of_a_chain_if_no_node_holds_the_whole_model(
    telemetry: Telemetry, features: tuple[BlockFeatures, ...], cluster: ClusterConfig
) -> None:
    model = fit_cost_model(telemetry, features)
    needed = sum(each.weight_bytes + cluster.kv_tokens * each.kv_bytes_per_token for each in features)
    states = {node.name: NodeReading(node.memory, 0.1) for node in cluster.nodes}

    def shares(memory: float) -> list[float]:
        nodes = tuple(node.model_copy(update={"memory": memory}) for node in cluster.nodes)
        posed = problem_from(model, features, cluster.model_copy(update={"nodes": nodes}), states, [CHAT])
        return [node.load_share for node in posed.nodes]

    names = cluster.node_names
    for memory, stages in ((needed, 1), (0.6 * needed, 2), (0.4 * needed, 3), (1.0, len(names))):
        assert shares(memory) == pytest.approx(node_times(model, features, names, [CHAT], stages).load_share)


@pytest.mark.parametrize("utilization", [0.1, 0.3, 0.6])
def test_the_formula_tells_the_time_of_requests_that_share_passes(utilization: float) -> None:
    fixed_s, session_s, tokens = 0.010, 0.002, 20
    share = share_of(model_of(fixed_s, session_s, 0.0), [RequestClass("c", "home-a", 1.0, 1, tokens + 1)])
    service_s = tokens * (fixed_s + session_s)
    rate_rps = utilization / (share * service_s)
    predicted_s = service_s / (1 - utilization)
    assert simulated_s(rate_rps, tokens, fixed_s, session_s) == pytest.approx(predicted_s, rel=0.05)


@pytest.mark.parametrize(("prompt_tokens", "new_tokens"), [(20, 6), (40, 20), (20, 40)])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("load", [0.2, 0.5])
def test_the_formula_tells_the_time_of_requests_on_a_chain(
    load: float, stages: int, prompt_tokens: int, new_tokens: int
) -> None:
    fixed_s, session_s, token_s = 0.007, 0.003, 0.002
    model = model_of(fixed_s, session_s, token_s, prefill_fixed_s=fixed_s + session_s)
    service_s = prompt_tokens * token_s + new_tokens * (fixed_s + session_s)
    rate_rps = load / service_s
    classes = [RequestClass("c", "home-a", stages * rate_rps, prompt_tokens, new_tokens)]
    machine = hardware(fixed_s, session_s, token_s)
    arrivals = poisson(rate_rps, lambda rng: new_tokens, 1, prompt_tokens)
    took_s = np.mean([latency_s for _, latency_s in latencies([machine] * stages, arrivals, 1000)])
    predicted_s = stages * service_s / (1 - share_of(model, classes, stages) * load)
    assert predicted_s == pytest.approx(took_s, rel=0.1)


def simulated_s(rate_rps: float, tokens: int, fixed_s: float, session_s: float, requests: int = 5000) -> float:
    """The mean time of requests that arrive at random at a node where all sessions share every pass."""
    arrivals_s = np.cumsum(np.random.default_rng(0).exponential(1 / rate_rps, requests)).tolist()
    now_s, next_arrival, took_s = 0.0, 0, []
    active: list[list[float]] = []  # arrival and tokens left of each session
    while next_arrival < requests or active:
        now_s = now_s if active else max(now_s, arrivals_s[next_arrival])
        while next_arrival < requests and arrivals_s[next_arrival] <= now_s:
            active.append([arrivals_s[next_arrival], tokens])
            next_arrival += 1
        now_s += fixed_s + session_s * len(active)
        active = [[arrival_s, left - 1] for arrival_s, left in active]
        took_s += [now_s - arrival_s for arrival_s, left in active if left == 0]
        active = [each for each in active if each[1] > 0]
    return float(np.mean(took_s))
