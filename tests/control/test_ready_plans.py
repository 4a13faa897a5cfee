"""Planning ahead without a clock: when plans are due, which of them hold, and what nodes should keep for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.control.ready_plans import ReadyPlans, plan_ahead
from resplit.control.rules import PlacementRules
from resplit.decide import Ready
from resplit.types import Problem
from tests.support.decisions import FAR, FAST, SLOW, halves, problem
from tests.support.telemetry import block_features
from tests.support.three_nodes import three_node_config

LIVE = halves(SLOW, FAST, 2)
RULES = PlacementRules(
    three_node_config(
        nodes=[{"name": name, "memory": "8 MiB"} for name in (FAST, SLOW, FAR)], source=FAST, trusted=[FAST, SLOW]
    ),
    tuple(replace(block_features()[1], name=f"block-{j}", private=j == 0) for j in range(8)),
)


def posed() -> Problem:
    return problem(LIVE)


def begun(epoch: int = 1) -> ReadyPlans:
    plans = ReadyPlans()
    plans.begin(epoch, posed(), None, 0.0)
    return plans


def test_plans_are_due_for_another_epoch_and_after_a_while() -> None:
    plans = ReadyPlans()
    assert plans.are_due(1, 0.0)
    plans = begun()
    assert not plans.are_due(1, 29.0)
    assert plans.are_due(1, 30.0)
    assert plans.are_due(2, 1.0)


def test_plans_are_not_made_again_while_the_state_is_nearly_the_same() -> None:
    plans = begun()
    plans.left.clear()
    plans.begin(1, posed(), None, 30.0)
    assert plans.left == []
    assert not plans.are_due(1, 31.0)
    before = posed()
    plans.begin(1, replace(before, decode_s_per_token=1.5 * before.decode_s_per_token), None, 60.0)
    assert plans.left


@pytest.mark.parametrize(("latency_s", "news"), [(4e-3, False), (50e-3, True)])
def test_a_slower_link_is_news_by_its_share_of_a_requests_time(latency_s: float, news: bool) -> None:
    before = problem(LIVE, decode_s=(1e-2, 2e-2, 4e-2), rate_rps=0.02)  # a request takes some seconds
    plans = ReadyPlans()
    plans.begin(1, before, None, 0.0)
    plans.left.clear()
    plans.begin(1, replace(before, link_latency_s=np.full((3, 3), latency_s)), None, 30.0)
    assert bool(plans.left) == news


def test_the_way_back_is_ready_and_plans_of_another_epoch_are_dropped() -> None:
    plans = begun()
    change = plans.left.pop(0)
    plans.note(change, (FAST,) * len(LIVE))
    assert plans.changes == (change.words,)
    plans.begin(2, posed(), LIVE[::-1], 1.0)
    assert plans.changes == ("the way back",)


@pytest.mark.parametrize("placement", [None, LIVE])
def test_a_plan_that_keeps_the_live_placement_is_none(placement: tuple[str, ...] | None) -> None:
    plans = begun()
    plans.note(plans.left.pop(0), placement)
    assert plans.changes == ()


def test_what_was_planned_for_a_loss_is_found_by_the_node_that_is_lost() -> None:
    plans = begun()
    change = next(each for each in plans.left if each.lost == SLOW)
    plans.note(change, (FAST,) * 8)
    assert plans.after_loss(1, [SLOW], RULES) == (FAST,) * 8
    assert plans.after_loss(1, [SLOW, FAR], RULES) is None
    assert plans.after_loss(2, [SLOW], RULES) is None
    assert plans.after_loss(1, [SLOW], replace(RULES, drained=frozenset({FAST}))) is None


def test_each_placement_is_ready_once_with_the_blocks_that_stand_by() -> None:
    plans = begun()
    first, second = plans.left[:2]
    for change in (first, second):
        plans.note(change, (FAST,) * len(LIVE))
    assert plans.ready(1, RULES, {SLOW: [3, 1], FAR: []}) == Ready(
        ((FAST,) * len(LIVE),), frozenset({(3, SLOW), (1, SLOW)})
    )
    assert plans.ready(2, RULES, {}) == Ready()


def test_a_node_keeps_what_it_hosts_first_and_then_what_plans_want_of_it() -> None:
    plans = begun()
    plans.note(plans.left.pop(0), halves(FAST, SLOW))
    assert plans.wanted(SLOW, 1, LIVE, RULES) == (0, 1, 4, 5, 6, 7)
    assert plans.wanted(FAR, 1, LIVE, RULES) == ()
    assert plans.wanted(SLOW, 1, LIVE, replace(RULES, drained=frozenset({SLOW}))) == ()


def test_a_node_without_trust_keeps_no_private_block_ready() -> None:
    plans = begun()
    untrusted = replace(RULES, cluster=RULES.cluster.model_copy(update={"trusted": (FAST,)}))
    assert plans.wanted(SLOW, 1, LIVE, untrusted) == (1,)


def test_a_plan_made_ahead_keeps_all_constraints() -> None:
    assert plan_ahead(posed(), 1.0, work_limit=50) is not None
