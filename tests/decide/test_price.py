"""The prices of alternatives."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from resplit.decide.price import (
    Alternative,
    CurrentPlacement,
    _exceeded,
    _gain,
    _outage,
    _overload,
    _round_trip_s,
    _sending_s,
    _waiting_cost,
    is_staged,
    price,
    price_current,
)
from resplit.decide.state import Ready
from resplit.planner.evaluate import Violation, evaluate
from resplit.types import Problem, RequestClass, Weights
from tests.support.decisions import FAR, FAST, SETTINGS, SLOW, halves, problem

CURRENT = halves(FAST, SLOW, 2)
BETTER = halves(FAST, SLOW, 6)


def test_prices_add_up_to_the_total_over_the_horizon() -> None:
    cluster = problem(CURRENT)
    current = price_current(cluster, SETTINGS)
    move = price(cluster, "re-split", BETTER, current, SETTINGS)
    before, after = (evaluate(cluster, placement) for placement in (CURRENT, BETTER))
    rate = cluster.classes[0].rate_rps
    waiting = move.pause_s * (rate * before.terms.latency_s + rate * move.pause_s / 2)
    gain = (before.objective - after.objective) * rate * (SETTINGS.horizon_s - move.transfer_s)
    assert move.net_gain == pytest.approx(gain - waiting)
    assert move.gain_per_request == pytest.approx(before.objective - after.objective)
    assert move.expected_requests == pytest.approx(rate * (SETTINGS.horizon_s - move.transfer_s))


def test_a_move_to_the_same_placement_costs_and_gains_nothing() -> None:
    cluster = problem(CURRENT)
    same = price(cluster, "re-split", CURRENT, price_current(cluster, SETTINGS), SETTINGS)
    assert (same.weight_bytes, same.cache_bytes, same.transfer_s, same.pause_s) == (0, 0, 0, 0)
    assert same.net_gain == pytest.approx(0)
    assert same.gain_per_request == 0


def test_nodes_load_in_parallel_and_each_one_block_after_another() -> None:
    cluster = problem((FAST,) * 8)
    current = price_current(cluster, SETTINGS)
    one = price(cluster, "re-split", (FAST,) * 4 + (SLOW,) * 4, current, SETTINGS)
    two = price(cluster, "re-split", (FAST,) * 4 + (SLOW,) * 2 + (FAR,) * 2, current, SETTINGS)
    assert one.weight_bytes == two.weight_bytes == 80e6
    assert two.transfer_s == pytest.approx(one.transfer_s / 2)
    caches_s = 4 * 1e3 * current.cached_tokens / 2e7
    assert one.transfer_s == pytest.approx(80e6 / 1e9 + caches_s)


def test_without_a_registry_rate_weights_come_over_the_link_from_the_source() -> None:
    cluster = problem(CURRENT)
    current = price_current(cluster, SETTINGS)
    slow_link = replace(SETTINGS, registry_bytes_per_s=None)
    at_the_source = price(cluster, "re-split", BETTER, current, slow_link)
    elsewhere = price(cluster, "re-split", (FAST,) * 2 + (FAR,) * 6, current, slow_link)
    assert at_the_source.transfer_s < 0.1  # only caches cross a link
    assert elsewhere.transfer_s > 6 * 20e6 / 2e7


def test_a_staged_move_pauses_for_the_transfer() -> None:
    cluster = problem(CURRENT)
    current = price_current(cluster, SETTINGS)
    beside = price(cluster, "re-split", BETTER, current, SETTINGS)
    staged = price(cluster, "re-split", halves(SLOW, FAST, 6), current, SETTINGS)  # six blocks fit, eight do not
    assert staged.transfer_s > 0
    prompt_s = 64 * float(cluster.prefill_s_per_token[range(8), [0 if name == FAST else 1 for name in CURRENT]].sum())
    assert staged.pause_s - staged.transfer_s - prompt_s == pytest.approx(beside.pause_s)


def test_the_pause_grows_with_the_round_trip_between_old_and_new_holder() -> None:
    near = problem(CURRENT)
    far = replace(near, link_latency_s=np.full((3, 3), 0.1))
    pauses = [price(c, "re-split", BETTER, price_current(c, SETTINGS), SETTINGS).pause_s for c in (near, far)]
    assert pauses == pytest.approx([SETTINGS.switch_s + 0.004, SETTINGS.switch_s + 0.2])


def test_if_the_current_placement_cannot_serve_requests_also_wait_for_the_transfer() -> None:
    broken = problem(halves(FAR, FAST))  # private blocks on a node without trust
    quickly, slowly = (replace(SETTINGS, registry_bytes_per_s=rate) for rate in (1e9, 1e7))
    elsewhere = (FAST,) * 6 + (FAR,) * 2
    costs = [price(broken, "re-split", elsewhere, price_current(broken, s), s) for s in (quickly, slowly)]
    longer_s = costs[1].transfer_s - costs[0].transfer_s
    rate = broken.classes[0].rate_rps
    assert costs[0].net_gain == costs[1].net_gain == float("inf")
    assert costs[1].horizon_cost - costs[0].horizon_cost > rate * longer_s**2 / 2


def test_the_requests_in_progress_hold_the_cached_tokens_and_no_more_than_are_reserved() -> None:
    calm = price_current(problem(CURRENT, rate_rps=0.01), SETTINGS)
    assert 0 < calm.cached_tokens < 64 + 32
    busy = replace(problem(CURRENT, rate_rps=2.0), kv_tokens=30.0)
    assert price_current(busy, SETTINGS).cached_tokens == 30.0


@pytest.mark.parametrize(
    ("change", "broken", "over"),
    [
        ({}, "", ""),
        ({"max_utilization": 0.12}, "", "utilization of fast"),
        ({"max_utilization": 0.18}, "", ""),
        ({"memory_bytes": 2 * 20.5e6 * 0.99}, "", ""),
        ({"memory_bytes": 2 * 20.5e6 * 0.9}, "", "memory of fast"),
        ({"trusted": False}, "trust", ""),
        ({"background_utilization": 0.99}, "overloaded", ""),
    ],
    ids=["fine", "ceiling", "ceiling passed by noise", "memory short by noise", "memory", "trust", "overload"],
)
def test_a_placement_that_cannot_serve_is_broken_and_one_over_a_limit_exceeds_it(
    change: dict[str, float], broken: str, over: str
) -> None:
    cluster = problem(CURRENT, rate_rps=1.0)  # 0.196 of the fast node is used
    nodes = (replace(cluster.nodes[0], **change), *cluster.nodes[1:])  # type: ignore[arg-type]
    current = price_current(replace(cluster, nodes=nodes), SETTINGS)
    assert (broken in current.broken) if broken else current.broken == ""
    assert (over in current.exceeded) if over else current.exceeded == ""


def _with_two_classes(cluster: Problem) -> Problem:
    chat = replace(cluster.classes[0], rate_rps=0.25, slo_s=0.01)
    return replace(cluster, classes=(chat, RequestClass("batch", SLOW, 0.5, 16, 48, slo_s=0.02)))


def test_the_current_placement_is_priced_for_the_requests_of_all_classes_over_the_horizon() -> None:
    cluster = _with_two_classes(problem(CURRENT))
    current, result = price_current(cluster, SETTINGS), evaluate(cluster, CURRENT)
    keep = current.keep
    assert (keep.action, keep.placement, keep.violations) == ("keep", CURRENT, ())
    assert keep.expected_requests == 0.75 * SETTINGS.horizon_s
    assert keep.horizon_cost == pytest.approx(0.75 * SETTINGS.horizon_s * result.objective)
    assert (keep.objective, keep.latency_s) == (result.objective, result.terms.latency_s)
    assert keep.shortfall_s == pytest.approx(result.class_latency_s.sum() - 0.03)
    assert (current.broken, current.exceeded) == ("", "")


def test_in_the_mean_a_request_in_progress_has_made_half_of_its_new_tokens() -> None:
    cluster = _with_two_classes(problem(CURRENT))
    chat_s, batch_s = evaluate(cluster, CURRENT).class_latency_s
    expected = 0.25 * chat_s * (64 + 32 / 2) + 0.5 * batch_s * (16 + 48 / 2)
    assert price_current(cluster, SETTINGS).cached_tokens == pytest.approx(expected)


def test_a_placement_on_absent_nodes_cannot_serve_and_its_reserved_caches_count() -> None:
    placement = ("gone", *CURRENT[1:-1], "away")
    current = price_current(problem(placement), SETTINGS)
    assert current == CurrentPlacement(
        Alternative("keep", placement, violations=("away, gone: no longer in the cluster",)),
        broken="away, gone: no longer in the cluster",
        exceeded="",
        cached_tokens=500,
        stalled=1.0,
    )


def test_an_overloaded_placement_has_an_infinite_price_and_the_caches_of_requests_without_queues() -> None:
    cluster = problem(CURRENT)
    busy = replace(cluster.nodes[0], background_utilization=0.99)
    overloaded = replace(cluster, nodes=(busy, *cluster.nodes[1:]))
    current, alone, asked = price_current(overloaded, SETTINGS), evaluate(overloaded, CURRENT), cluster.classes[0]
    assert current.keep.horizon_cost == math.inf
    # The change was noticed a moment ago: the caches are not all that could ever be reserved.
    requests = asked.rate_rps * float(alone.compute_s[0] + alone.network_s[0])
    assert current.cached_tokens == pytest.approx(requests * (asked.prompt_tokens + asked.new_tokens / 2))
    assert current.cached_tokens < 500
    assert current.exceeded == ""


def test_requests_of_an_overloaded_placement_wait_for_a_part_of_the_transfer_only() -> None:
    cluster, rate = problem(CURRENT), problem(CURRENT).classes[0].rate_rps
    elsewhere, slowly = (FAST,) * 6 + (FAR,) * 2, replace(SETTINGS, registry_bytes_per_s=1e7)
    nodes = (cluster.nodes[0], replace(cluster.nodes[1], background_utilization=0.97), cluster.nodes[2])
    overloaded = replace(cluster, nodes=nodes)
    use = evaluate(overloaded, CURRENT).utilization.max()
    assert 1 < use < 1.3
    current = price_current(overloaded, slowly)
    assert current.stalled == pytest.approx(1 - 1 / use)
    move = price(overloaded, "re-split", elsewhere, current, slowly)
    waited_s = move.pause_s + current.stalled * move.transfer_s
    waiting = waited_s * (rate * move.latency_s + rate * waited_s / 2)
    assert move.horizon_cost == pytest.approx(rate * slowly.horizon_s * move.objective + waiting)
    assert waited_s < 0.4 * move.transfer_s


def test_a_placement_that_breaks_privacy_has_an_infinite_price_although_its_latency_is_finite() -> None:
    current = price_current(problem(halves(FAR, FAST)), SETTINGS)
    assert math.isfinite(current.keep.objective)
    assert current.keep.horizon_cost == math.inf
    assert current.keep.violations == ("trust: private block block-0 on far, which is not trusted",)


def test_a_move_is_priced_with_the_bytes_of_the_blocks_that_move() -> None:
    cluster = problem(CURRENT)
    current = price_current(cluster, SETTINGS)
    move = price(cluster, "redistribute", BETTER, current, SETTINGS)
    assert (move.action, move.placement, move.violations) == ("redistribute", BETTER, ())
    assert move.weight_bytes == 4 * 20e6
    assert move.cache_bytes == pytest.approx(4 * 1e3 * current.cached_tokens)
    before, after = evaluate(cluster, CURRENT).objective, evaluate(cluster, BETTER).objective
    waiting = _waiting_cost(cluster, move.pause_s, current.keep.latency_s)
    expected = 0.5 * ((SETTINGS.horizon_s - move.transfer_s) * after + move.transfer_s * before) + waiting
    assert move.horizon_cost == pytest.approx(expected)


def test_a_transfer_longer_than_the_horizon_leaves_no_requests_to_gain() -> None:
    cluster = problem(CURRENT)
    slowly = replace(SETTINGS, registry_bytes_per_s=80e6 / 200)
    move = price(cluster, "re-split", BETTER, price_current(cluster, slowly), slowly)
    assert move.transfer_s > 200
    assert move.expected_requests == 0
    assert move.net_gain < 0
    assert move.gain_per_request > 0


def test_from_a_placement_that_cannot_serve_a_move_costs_the_new_objective_and_the_wait() -> None:
    cluster = problem(halves(FAR, FAST))
    current = price_current(cluster, SETTINGS)
    move = price(cluster, "re-split", BETTER, current, SETTINGS)
    after = evaluate(cluster, BETTER)
    waiting = _waiting_cost(cluster, move.pause_s + move.transfer_s, after.terms.latency_s)
    assert move.horizon_cost == pytest.approx(0.5 * SETTINGS.horizon_s * after.objective + waiting)
    assert (move.gain_per_request, move.net_gain) == (math.inf, math.inf)


def test_from_a_placement_that_cannot_serve_a_staged_move_pauses_no_longer() -> None:
    cluster = problem(("gone",) + (FAST,) * 5 + (SLOW,) * 2)
    move = price(cluster, "re-split", halves(SLOW, FAST, 6), price_current(cluster, SETTINGS), SETTINGS)
    assert move.transfer_s > 0
    assert move.pause_s == pytest.approx(SETTINGS.switch_s + 0.004)


def test_an_outage_delays_the_requests_in_progress_by_all_of_it_and_those_that_arrive_by_half() -> None:
    cluster = replace(_with_two_classes(problem(CURRENT)), weights=Weights(latency=2.0))
    assert _waiting_cost(cluster, outage_s=3.0, latency_s=4.0) == pytest.approx(2 * 3 * (0.75 * 4 + 0.75 * 3 / 2))


@pytest.mark.parametrize(
    ("before", "after", "gain"),
    [(3.0, 1.0, 2.0), (math.inf, 1.0, math.inf), (1.0, math.inf, -math.inf), (math.inf, math.inf, 0.0)],
)
def test_the_gain_is_what_the_price_falls_by(before: float, after: float, gain: float) -> None:
    assert _gain(before, after) == gain


def test_every_reason_why_a_placement_cannot_serve_is_given_in_one_text() -> None:
    cluster = problem(CURRENT)
    violations = (
        Violation("privacy", "private"),
        Violation("cannot_run", "no program"),
        Violation("link", "no link"),
        Violation("memory", "too large", 9.0, 1.0),
        Violation("cut", "not here"),
    )
    utilization = np.array([1.0, 0.999, 2.0])  # the far node is overloaded, but holds no block
    result = replace(evaluate(cluster, CURRENT), utilization=utilization, violations=violations)
    assert _overload(cluster, result, CURRENT) == "fast is overloaded (1.00)"
    assert _outage(result) == "private; no program; no link"


def test_only_limits_exceeded_by_more_than_a_fiftieth_are_reported() -> None:
    cluster = problem(CURRENT)
    violations = (
        Violation("memory", "memory by noise", 2.0, 100.0),
        Violation("memory", "memory", 2.1, 100.0),
        Violation("utilization", "use by noise", 0.02, 0.5),
        Violation("utilization", "use", 0.021, 0.5),
        Violation("cut", "a cut", 9.0, 0.0),
    )
    assert _exceeded(replace(evaluate(cluster, CURRENT), violations=violations)) == "memory; use"


BLOCK_BYTES = 20e6 + 500 * 1e3  # weights and reserved caches


@pytest.mark.parametrize(
    ("receiver_bytes", "staged"),
    [(6 * BLOCK_BYTES, False), (6 * BLOCK_BYTES - 1, True)],
    ids=["just enough", "a byte short"],
)
def test_a_moveis_staged_if_a_receiver_cannot_hold_old_and_new_blocks_at_once(
    receiver_bytes: float, staged: bool
) -> None:
    cluster = problem(CURRENT)
    fast, slow, far = cluster.nodes
    receiver = replace(fast, memory_bytes=receiver_bytes)
    assert is_staged(replace(cluster, nodes=(receiver, slow, far)), BETTER) == staged
    assert is_staged(replace(cluster, nodes=(far, slow, receiver)), BETTER) == staged


def test_a_node_that_only_gives_blocks_away_or_keeps_its_own_does_not_stage_a_move() -> None:
    cluster = problem(CURRENT)
    fast, slow, far = cluster.nodes
    small = replace(slow, memory_bytes=1.0)
    assert not is_staged(replace(cluster, nodes=(small, fast, far)), BETTER)
    assert not is_staged(replace(cluster, nodes=(small, fast, far)), CURRENT)


def _with_links(latency_s: list[list[float]], bandwidth: list[list[float]]) -> Problem:
    links = {"link_latency_s": np.array(latency_s), "link_bandwidth_bytes_per_s": np.array(bandwidth)}
    return replace(problem(CURRENT), **links)  # type: ignore[arg-type]


GAP = math.nan
LINKED = _with_links(
    [[GAP, 0.1, 0.2], [0.3, GAP, GAP], [0.5, 0.6, GAP]], [[GAP, 1.0, 2.0], [3.0, GAP, GAP], [5.0, 6.0, GAP]]
)


@pytest.mark.parametrize(
    ("source", "target", "sending_s"),
    [(FAST, SLOW, 60.0), (SLOW, FAST, 20.0), (SLOW, SLOW, 0.0), (SLOW, FAR, 0.0), ("gone", FAST, 0.0)],
)
def test_sending_takes_the_bandwidth_of_the_direction_and_no_time_where_nothing_is_sent(
    source: str, target: str, sending_s: float
) -> None:
    assert _sending_s(LINKED, source, target, 60.0) == sending_s


@pytest.mark.parametrize(
    ("moved", "round_trip_s"), [([], 0.0), ([0], 0.2), ([0, 1], 1.0), ([2], 0.0), ([3], 0.0), ([0, 2, 3], 0.2)]
)
def test_the_round_trip_is_the_longest_of_those_from_an_old_to_a_new_holder(
    moved: list[int], round_trip_s: float
) -> None:
    cluster = replace(LINKED, current=(FAST, FAR, SLOW, "gone"))
    assert _round_trip_s(cluster, moved, (SLOW, FAST, FAR, FAST)) == round_trip_s


def test_an_alternative_without_a_price_is_infinitely_bad_and_moves_nothing() -> None:
    nothing = Alternative("re-split", None)
    assert nothing.objective == nothing.latency_s == nothing.horizon_cost == math.inf
    assert nothing.shortfall_s == nothing.weight_bytes == nothing.transfer_s == nothing.net_gain == 0


def test_blocks_that_are_ready_need_no_weights_and_only_their_caches_take_time() -> None:
    cluster = problem(CURRENT)
    current = price_current(cluster, SETTINGS)
    moved = [j for j, (old, new) in enumerate(zip(CURRENT, BETTER, strict=True)) if old != new]
    cold = price(cluster, "re-split", BETTER, current, SETTINGS)
    half = price(cluster, "re-split", BETTER, current, SETTINGS, Ready(loaded=frozenset({(moved[0], FAST)})))
    warm = price(cluster, "re-split", BETTER, current, SETTINGS, Ready(loaded=frozenset((j, FAST) for j in moved)))
    elsewhere = price(cluster, "re-split", BETTER, current, SETTINGS, Ready(loaded=frozenset((j, FAR) for j in moved)))
    assert elsewhere == cold
    assert cold.weight_bytes - half.weight_bytes == cluster.blocks[moved[0]].weight_bytes
    assert warm.weight_bytes == 0
    assert warm.cache_bytes == cold.cache_bytes
    caches_s = cold.transfer_s - sum(cluster.blocks[j].weight_bytes for j in moved) / SETTINGS.registry_bytes_per_s
    assert warm.transfer_s == pytest.approx(caches_s)
    assert warm.net_gain > half.net_gain > cold.net_gain
