"""The forecast is what a line served in order would do, and follows the pace of late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.gateway.sessions.wait_forecast import Pace, Work, wait_s

SESSIONS, TOKENS = 3, 100
WORK = st.builds(Work, st.integers(0, 20).map(float), st.integers(1, TOKENS))


@st.composite
def crowds(draw: st.DrawFn) -> tuple[list[Work], list[Work]]:
    """Some that run, within the room, and some in line."""
    inside: list[Work] = []
    for work in draw(st.lists(WORK, max_size=SESSIONS)):
        if sum(each.tokens for each in inside) + work.tokens <= TOKENS:
            inside.append(work)
    return inside, draw(st.lists(WORK, min_size=1, max_size=8))


def second_by_second(inside: list[Work], line: list[Work]) -> int:
    """The oracle: let every second pass, and see who has left and who has had a turn by then."""
    ends = [(int(work.seconds), work.tokens) for work in inside]
    waiting = list(line)
    for now_s in range(1000):
        while True:
            ends = [end for end in ends if end[0] > now_s]
            if not waiting or len(ends) >= SESSIONS or sum(t for _, t in ends) + waiting[0].tokens > TOKENS:
                break
            work = waiting.pop(0)
            ends.append((now_s + int(work.seconds), work.tokens))
            if not waiting:
                return now_s
    raise AssertionError("nobody's turn takes so long")


@given(crowd=crowds())
def test_the_wait_is_that_of_a_line_served_in_order(crowd: tuple[list[Work], list[Work]]) -> None:
    inside, line = crowd
    running = [work for work in inside if work.seconds > 0]
    line = [Work(max(1.0, work.seconds), work.tokens) for work in line]
    assert wait_s(running, line, SESSIONS, TOKENS) == second_by_second(running, line)


@given(crowd=crowds(), more=WORK)
def test_nobody_is_served_sooner_behind_a_longer_line(crowd: tuple[list[Work], list[Work]], more: Work) -> None:
    inside, line = crowd
    assert wait_s(inside, [*line, more], SESSIONS, TOKENS) >= wait_s(inside, line, SESSIONS, TOKENS)


def test_where_there_is_room_nobody_waits() -> None:
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


def test_what_was_seen_long_ago_says_nothing_and_before_anything_was_seen_nothing_is_said() -> None:
    assert Pace().service_s(0, 10, 10) is None
    assert Pace().service_s(0, 10, 10, made=3) is None
    pace = seen(0.5, 0.1, 0.1, window_s=2.0)
    assert pace.service_s(2.0, 10, 10, made=9) == pytest.approx(0.7 / 3)
    assert pace.service_s(3.9, 10, 10, made=9) == pytest.approx(0.1)
    assert pace.service_s(9.0, 10, 10, made=9) is None


@given(
    noted=st.lists(st.tuples(st.floats(0, 5), st.floats(0.001, 10)), min_size=1, max_size=60),
    made=st.integers(1, 9),
)
def test_the_pace_lies_between_the_fastest_and_the_slowest_of_late(noted: list[tuple[float, float]], made: int) -> None:
    pace, now_s, times = Pace(10.0), 0.0, []
    for pause_s, took_s in noted:
        now_s += pause_s
        pace.next_token(now_s, took_s)
        times.append((now_s, took_s))
    lately = [took_s for at_s, took_s in times if at_s >= now_s - 10.0]
    predicted = pace.service_s(now_s, 1, 10, made=made)
    assert predicted is not None
    assert (10 - made) * min(lately) * 0.999 <= predicted <= (10 - made) * max(lately) * 1.001
