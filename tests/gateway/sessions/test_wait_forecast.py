"""The forecast equals the wait in a queue that is served in order, and follows the recent pace."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.gateway.sessions.wait_forecast import Pace, Work, wait_s

SESSIONS, TOKENS = 3, 100
WORK = st.builds(Work, st.integers(0, 20).map(float), st.integers(1, TOKENS))


@st.composite
def crowds(draw: st.DrawFn) -> tuple[list[Work], list[Work]]:
    """Requests that run, within the limits, and requests in the queue."""
    running: list[Work] = []
    for work in draw(st.lists(WORK, max_size=SESSIONS)):
        if sum(each.tokens for each in running) + work.tokens <= TOKENS:
            running.append(work)
    return running, draw(st.lists(WORK, min_size=1, max_size=8))


def second_by_second(running: list[Work], queue: list[Work]) -> int:
    """The expected wait: simulate every second until the last request of the queue is served."""
    ends = [(int(work.seconds), work.tokens) for work in running]
    waiting = list(queue)
    for now_s in range(1000):
        while True:
            ends = [end for end in ends if end[0] > now_s]
            if not waiting or len(ends) >= SESSIONS or sum(t for _, t in ends) + waiting[0].tokens > TOKENS:
                break
            work = waiting.pop(0)
            ends.append((now_s + int(work.seconds), work.tokens))
            if not waiting:
                return now_s
    raise AssertionError("no wait is so long")


@given(crowd=crowds())
def test_the_wait_is_that_of_a_queue_served_in_order(crowd: tuple[list[Work], list[Work]]) -> None:
    running, queue = crowd
    running = [work for work in running if work.seconds > 0]
    queue = [Work(max(1.0, work.seconds), work.tokens) for work in queue]
    assert wait_s(running, queue, SESSIONS, TOKENS) == second_by_second(running, queue)


@given(crowd=crowds(), more=WORK)
def test_no_request_is_served_sooner_after_a_longer_queue(crowd: tuple[list[Work], list[Work]], more: Work) -> None:
    running, queue = crowd
    assert wait_s(running, [*queue, more], SESSIONS, TOKENS) >= wait_s(running, queue, SESSIONS, TOKENS)


def test_no_request_waits_while_there_is_room() -> None:
    assert wait_s([], [Work(9.0, TOKENS)], SESSIONS, TOKENS) == 0
    assert wait_s([Work(9.0, 50)], [Work(9.0, 50)], SESSIONS, TOKENS) == 0
    assert wait_s([Work(9.0, 50)], [Work(9.0, 51)], SESSIONS, TOKENS) == 9


def seen(*tokens_s: float, window_s: float = 30.0) -> Pace:
    """Prompts of 10 tokens took 0.5 s each, further tokens as given, one each second from 0 on."""
    pace = Pace(window_s)
    for second, token_s in enumerate(tokens_s):
        pace.first_token(second, 10, 0.5)
        pace.next_token(second, token_s)
    return pace


def test_service_is_the_prompt_and_then_token_by_token() -> None:
    pace = seen(0.1, 0.3)
    assert pace.service_s(1, prompt_tokens=20, new_tokens=1) == pytest.approx(1.0)
    assert pace.service_s(1, prompt_tokens=20, new_tokens=6) == pytest.approx(1.0 + 5 * 0.2)
    assert pace.service_s(1, prompt_tokens=20, new_tokens=6, made=4) == pytest.approx(2 * 0.2)
    assert pace.service_s(1, prompt_tokens=1, new_tokens=1) == pytest.approx(0.2), "no pass is shorter than a token's"


def test_requests_are_expected_to_end_as_early_as_others_did() -> None:
    pace = seen(0.2)
    pace.ended(0, wanted=100, made=25)
    assert pace.service_s(0, prompt_tokens=10, new_tokens=40) == pytest.approx(0.5 + 9 * 0.2)
    assert pace.service_s(0, prompt_tokens=10, new_tokens=40, made=30) == pytest.approx(0.2), "one more at least"


def test_old_times_do_not_count_and_without_recent_ones_there_is_no_forecast() -> None:
    assert Pace().service_s(0, 10, 10) is None
    assert Pace().service_s(0, 10, 10, made=3) is None
    assert Pace().tokens_within(0, 10, 10) == math.inf


def test_as_many_tokens_come_within_a_time_as_the_recent_pace_allows() -> None:
    pace = Pace()
    pace.first_token(0.0, 10, 1.0)
    pace.next_token(0.0, 0.5)
    assert pace.tokens_within(0.0, 20, 3.0) == 1 + (3.0 - 2.0) / 0.5
    pace = seen(0.5, 0.1, 0.1, window_s=2.0)
    assert pace.service_s(2.0, 10, 10, made=9) == pytest.approx(0.7 / 3)
    assert pace.service_s(3.9, 10, 10, made=9) == pytest.approx(0.1)
    assert pace.service_s(9.0, 10, 10, made=9) is None


@given(
    recorded=st.lists(st.tuples(st.floats(0, 5), st.floats(0.001, 10)), min_size=1, max_size=60),
    made=st.integers(1, 9),
)
def test_the_pace_lies_between_the_fastest_and_the_slowest_recent_times(
    recorded: list[tuple[float, float]], made: int
) -> None:
    pace, now_s, times = Pace(10.0), 0.0, []
    for pause_s, took_s in recorded:
        now_s += pause_s
        pace.next_token(now_s, took_s)
        times.append((now_s, took_s))
    recent = [took_s for at_s, took_s in times if at_s >= now_s - 10.0]
    predicted = pace.service_s(now_s, 1, 10, made=made)
    assert predicted is not None
    assert (10 - made) * min(recent) * 0.999 <= predicted <= (10 - made) * max(recent) * 1.001
