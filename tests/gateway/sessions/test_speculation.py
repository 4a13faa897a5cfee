"""Drafts are verified as long as they are expected to pay, and what they cost is learned from the passes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.gateway.sessions.speculation import PassTimes, RouteTimes, Speculation


def measured(pass_s: float, draft_s: float, passes: int = 200) -> PassTimes:
    """Times after passes with changing numbers of drafts."""
    times, rng = PassTimes(), random.Random(3)
    times.prompt(64, pass_s + 64 * draft_s)
    for _ in range(passes):
        drafts = rng.choice((0, 0, 1, 3, 8))
        times.decoded(drafts, (pass_s + drafts * draft_s) * rng.uniform(0.95, 1.05))
    return times


@pytest.mark.parametrize(("pass_s", "draft_s"), [(0.1, 0.001), (0.1, 0.02), (0.02, 0.02)])
def test_the_costs_of_a_pass_and_of_a_draft_are_told_apart(pass_s: float, draft_s: float) -> None:
    times = measured(pass_s, draft_s)
    assert times.pass_s == pytest.approx(pass_s, rel=0.1)
    assert times.draft_s == pytest.approx(draft_s, abs=0.05 * pass_s)


def test_the_window_grows_with_the_hits_and_shrinks_with_the_cost_of_a_draft() -> None:
    far, near = measured(0.1, 0.002), measured(0.01, 0.004)
    assert far.choose_window([0.95] * 15, 1) > near.choose_window([0.95] * 15, 1) >= 1
    assert far.choose_window([0.95] * 15, 1) > far.choose_window([0.5] * 15, 1) >= 1
    assert far.choose_window([0.95] * 15, 1) > far.choose_window([0.95] * 15, 16)
    assert far.choose_window([0.05] * 15, 1) == 0
    assert far.choose_window([], 1) == 0


def test_hardware_on_which_a_draft_costs_a_whole_pass_verifies_none() -> None:
    assert measured(0.1, 0.1).choose_window([0.9] * 15, 1) == 0


def test_before_a_pass_was_timed_there_are_no_drafts_and_the_first_time_there_is_one() -> None:
    times = PassTimes()
    assert times.choose_window([0.99] * 15, 1) == 0
    times.prompt(64, 0.2)
    times.decoded(0, 0.1)
    assert times.choose_window([0.99] * 15, 1) == 1
    times.decoded(1, 0.102)
    assert times.choose_window([0.99] * 15, 1) > 4


def test_drafts_that_became_too_slow_are_tried_again_some_time() -> None:
    times = measured(0.1, 0.1)
    tries = next(number for number in range(10_000) if times.choose_window([0.9] * 15, 1))
    assert 20 < tries < 1000


@given(st.lists(st.floats(0.01, 0.99), max_size=15), st.floats(0, 0.2), st.integers(1, 16))
def test_a_window_is_expected_to_give_more_tokens_a_second_than_none(
    rates: list[float], draft_s: float, streams: int
) -> None:
    times = measured(0.1, 0.01, passes=20)
    times.pass_s, times.draft_s = 0.1, draft_s
    window = times.choose_window(rates, streams)
    tokens, likely = 1.0, 1.0
    for rate in rates[:window]:
        likely *= rate
        tokens += likely
    assert window == 0 or tokens / (0.1 + streams * window * draft_s) > 1.09 / 0.1


def test_a_new_route_begins_with_what_a_draft_cost_on_the_one_before() -> None:
    routes = RouteTimes()
    routes.of(1).prompt(10, 0.1)
    assert routes.of(2).draft_s == routes.of(1).draft_s == 0.01
    assert routes.of(2).pass_s == 0.0
    assert routes.of(2) is routes.of(2)


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), min_size=9, max_size=9))
def test_the_new_tokens_are_those_that_follow_from_tokens(drafts: list[int], truth: list[int]) -> None:
    speculation = Speculation((1, 2), 15)
    # An answer after a wrong draft is of no meaning.
    answers = [truth[at] if drafts[:at] == truth[:at] else 7 for at in range(len(drafts) + 1)]
    new = speculation.accept(drafts, answers)
    assert list(new) == truth[: len(new)]
    assert len(new) == 1 + speculation.accepted
    assert speculation.drafted == len(drafts)
    assert speculation.accepted == len(drafts) or drafts[speculation.accepted] != truth[speculation.accepted]


def test_no_draft_exceeds_the_room_or_the_limit_of_the_cluster_file() -> None:
    far = measured(0.1, 0.0001)
    prompt = [1, 2, 3] * 20
    windows = [len(Speculation(prompt, most).drafts(far, 1, room)) for most, room in ((15, 3), (2, 9), (0, 9), (15, 0))]
    assert windows == [3, 2, 0, 0]
