"""The prices of alternatives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.decide.price import price, price_current
from resplit.planner.evaluate import evaluate
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
    assert staged.pause_s - staged.transfer_s == pytest.approx(beside.pause_s)


def test_the_pause_grows_with_the_round_trip_between_old_and_new_holder() -> None:
    near = problem(CURRENT)
    far = replace(near, link_latency_s=np.full((3, 3), 0.1))
    pauses = [price(c, "re-split", BETTER, price_current(c, SETTINGS), SETTINGS).pause_s for c in (near, far)]
    assert pauses == pytest.approx([SETTINGS.switch_s + 0.004, SETTINGS.switch_s + 0.2])


def test_if_the_current_placement_cannot_serve_requests_also_wait_for_the_transfer() -> None:
    working = problem(CURRENT)
    broken = replace(
        working, nodes=(*working.nodes[:1], replace(working.nodes[1], background_utilization=0.99), working.nodes[2])
    )
    quickly, slowly = (replace(SETTINGS, registry_bytes_per_s=rate) for rate in (1e9, 1e7))
    elsewhere = (FAST,) * 6 + (FAR,) * 2
    costs = [price(broken, "re-split", elsewhere, price_current(broken, s), s) for s in (quickly, slowly)]
    longer_s = costs[1].transfer_s - costs[0].transfer_s
    rate = working.classes[0].rate_rps
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
