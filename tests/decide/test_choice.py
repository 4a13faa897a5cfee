"""Which of the priced alternatives is chosen: threshold, cooldown and bars, and the reason that is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resplit.decide import Alternative, History, Measured, PastMove
from resplit.decide.orchestrator import _choose_by_net_gain, _choose_escape, _Hysteresis, _missed_objective
from resplit.decide.price import CurrentPlacement
from tests.support.decisions import (
    BEST,
    FAST,
    NO_HISTORY,
    SETTINGS,
    SLOW,
    halves,
    moved,
)

KEEP = Alternative("keep", BEST, objective=10.0, latency_s=10.0, shortfall_s=2.0)


CURRENT = CurrentPlacement(KEEP, broken="", exceeded="", cached_tokens=0.0)


OTHER = Alternative("re-split", halves(FAST, SLOW, 2), gain_per_request=1.0, net_gain=5.0, shortfall_s=1.0)


def _hysteresis(history: History = NO_HISTORY, now_s: float = 1000.0, threshold: float = 0.05) -> _Hysteresis:
    return _Hysteresis(SETTINGS, history, now_s, threshold)


@pytest.mark.parametrize(("gain", "objects"), [(0.5, True), (0.51, False)])
def test_the_gain_per_request_must_exceed_the_threshold(gain: float, objects: bool) -> None:
    option = replace(OTHER, gain_per_request=gain)
    assert ("threshold" in _hysteresis().objection(option, CURRENT, waive_cooldown=False)) == objects
    exceeded = replace(CURRENT, exceeded="memory of fast")
    assert _hysteresis().objection(option, exceeded, waive_cooldown=False) == ""


@pytest.mark.parametrize(
    ("since_s", "waived", "objects"),
    [(0.0, False, True), (29.9, False, True), (30.0, False, False), (0.0, True, False)],
)
def test_the_cooldown_counts_from_the_last_move_unless_it_is_waived(
    since_s: float, waived: bool, objects: bool
) -> None:
    hysteresis = _hysteresis(History(replace(moved(), at_s=1000.0 - since_s)))
    assert ("last move" in hysteresis.objection(OTHER, CURRENT, waive_cooldown=waived)) == objects


def test_waiving_the_cooldown_waives_neither_the_threshold_nor_a_bar() -> None:
    assert OTHER.placement is not None
    barred = History().moved(PastMove(900.0, "rollback", OTHER.placement, BEST, None, 1.0), SETTINGS)
    assert "rolled back" in _hysteresis(barred).objection(OTHER, CURRENT, waive_cooldown=True)
    assert "threshold" in _hysteresis(threshold=0.2).objection(OTHER, CURRENT, waive_cooldown=True)


MISSED = Measured(10.0, 20, ("chat",))


MET = Measured(10.0, 20)


@pytest.mark.parametrize(
    ("shortfall_s", "other_s", "measured", "urgent"),
    [
        (2.0, 1.0, None, "a service objective is missed"),
        (2.0, 1.0, MET, "a service objective is missed"),
        (2.0, 1.0, MISSED, "a service objective is missed (chat)"),
        (2.0, 2.0, MISSED, ""),
        (2.0, 3.0, MISSED, ""),
        (0.5, 0.0, None, ""),
        (0.5, 0.0, MET, ""),
        (0.51, 0.0, MET, "a service objective is missed"),
        (0.5, 0.0, MISSED, "a service objective is missed (chat)"),
        (0.0, 0.0, MISSED, ""),
    ],
)
def test_the_cooldown_is_waived_if_an_objective_is_missed_and_a_plan_misses_it_by_less(
    shortfall_s: float, other_s: float, measured: Measured | None, urgent: str
) -> None:
    current = replace(CURRENT, keep=replace(KEEP, shortfall_s=shortfall_s))
    plans = [Alternative("redistribute", None), replace(OTHER, shortfall_s=other_s)]
    assert _missed_objective(current, plans, measured, threshold=0.05) == urgent


def test_a_plan_without_a_placement_does_not_waive_the_cooldown() -> None:
    assert _missed_objective(CURRENT, [replace(OTHER, placement=None, shortfall_s=0.0)], MISSED, 0.05) == ""


def test_one_plan_of_two_that_misses_an_objective_by_less_waives_the_cooldown() -> None:
    plans = [replace(OTHER, shortfall_s=9.0), OTHER]
    assert _missed_objective(CURRENT, plans, MISSED, 0.05)


def test_the_highest_net_gain_is_chosen_and_a_tie_is_a_redistribution() -> None:
    redistribute = replace(OTHER, action="redistribute")
    assert _choose_by_net_gain(CURRENT, [redistribute, OTHER], None, _hysteresis()).chosen is redistribute
    better = replace(OTHER, net_gain=5.1)
    assert _choose_by_net_gain(CURRENT, [redistribute, better], None, _hysteresis()).chosen is better


def test_if_hysteresis_objects_to_the_best_plan_the_next_best_is_chosen() -> None:
    assert OTHER.placement is not None
    barred = History().moved(PastMove(900.0, "rollback", OTHER.placement, BEST, None, 1.0), SETTINGS)
    second = replace(OTHER, action="redistribute", placement=halves(SLOW, FAST, 4), net_gain=1.0)
    assert _choose_by_net_gain(CURRENT, [second, OTHER], None, _hysteresis(barred)).chosen is second


def test_if_hysteresis_objects_to_all_plans_the_reason_describes_the_best_plan() -> None:
    plans = [replace(OTHER, net_gain=1.0, latency_s=1.0), replace(OTHER, latency_s=2.0)]
    choice = _choose_by_net_gain(CURRENT, plans, None, _hysteresis(threshold=0.2))
    assert choice.chosen is KEEP
    assert choice.reason.startswith("re-split promises 2.000 s")
    assert "within the threshold of 20.0%" in choice.reason


@pytest.mark.parametrize(("net_gain", "action"), [(0.0, "keep"), (0.1, "re-split")])
def test_a_move_must_gain_more_than_it_costs(net_gain: float, action: str) -> None:
    choice = _choose_by_net_gain(CURRENT, [replace(OTHER, net_gain=net_gain)], None, _hysteresis())
    assert choice.chosen.action == action


def test_a_broken_placement_is_left_for_the_least_cost_over_the_horizon() -> None:
    broken = replace(CURRENT, broken="lost")
    cheaper, costlier = replace(OTHER, horizon_cost=3.0), replace(OTHER, action="redistribute", horizon_cost=4.0)
    impossible = replace(OTHER, placement=None, horizon_cost=1.0)
    choice = _choose_escape(broken, [costlier, impossible, cheaper])
    assert (choice.chosen, choice.urgent) == (cheaper, "lost")


def test_the_reason_of_a_move_gives_its_latency_gain_bytes_and_time() -> None:
    option = replace(OTHER, latency_s=1.25, gain_per_request=0.5, weight_bytes=80e6, cache_bytes=2.5e6, transfer_s=1.75)
    costs = "for 80 MB of weights and 2.5 MB of caches in 1.8 s"
    decided = _choose_by_net_gain(CURRENT, [option], None, _hysteresis(threshold=0.01))
    assert decided.reason == f"re-split promises 1.250 s, 0.500 less per request, {costs}"
    exceeded = replace(CURRENT, exceeded="memory of fast")
    assert _choose_by_net_gain(exceeded, [option], None, _hysteresis()).reason.startswith("memory of fast; re-split")
    broken = replace(CURRENT, broken="no link")
    escape = _choose_escape(broken, [replace(option, gain_per_request=float("inf"))])
    assert escape.reason == f"the current placement cannot serve (no link); re-split promises 1.250 s, {costs}"


def test_a_broken_placement_without_a_plan_names_why_each_kind_of_plan_is_absent() -> None:
    plans = [Alternative("redistribute", None, reason="no memory"), Alternative("re-split", None, reason="no link")]
    choice = _choose_escape(replace(CURRENT, broken="lost"), plans)
    assert (choice.chosen, choice.urgent) == (KEEP, "lost")
    assert choice.reason == (
        "the current placement cannot serve (lost), and there is no alternative: "
        "redistribute: no memory; re-split: no link"
    )


def test_a_placement_that_exceeds_a_limit_is_kept_with_the_limit_as_the_reason_if_there_is_no_plan() -> None:
    choice = _choose_by_net_gain(
        replace(CURRENT, exceeded="memory of fast"), [replace(OTHER, placement=None)], MISSED, _hysteresis()
    )
    assert choice.chosen is KEEP
    assert choice.reason == "no alternative gains more than its move costs, although memory of fast"


def test_a_missed_objective_is_the_reason_why_a_choice_is_urgent() -> None:
    urgent = "a service objective is missed (chat)"
    assert _choose_by_net_gain(CURRENT, [OTHER], MISSED, _hysteresis()).urgent == urgent
    assert _choose_by_net_gain(CURRENT, [OTHER], MISSED, _hysteresis(threshold=0.2)).urgent == urgent
    assert _choose_by_net_gain(CURRENT, [replace(OTHER, net_gain=0.0)], MISSED, _hysteresis()).urgent == urgent
    recent = _hysteresis(History(replace(moved(), at_s=999.0)))
    assert _choose_by_net_gain(CURRENT, [OTHER], MISSED, recent).chosen is OTHER


def test_without_any_move_yet_there_is_no_cooldown() -> None:
    assert _hysteresis(now_s=0.0).objection(OTHER, CURRENT, waive_cooldown=False) == ""
