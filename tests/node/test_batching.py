"""Which passes run together: every decode step of a segment, and one chunk of the prompt that waits longest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.model.activation import token_ids
from resplit.model.engines.base import CHUNK_TOKENS
from resplit.node.batching import (
    HALVED_FROM,
    MOST_SESSIONS,
    Batch,
    ChunkPace,
    Half,
    Part,
    SegmentPass,
    Waiting,
    in_order,
    next_batch,
    still_waiting,
)


def step(session: str, start: int = 5, segment: tuple[int, int] = (0, 3)) -> Waiting:
    return Waiting(SegmentPass(session, *segment, start, 64, token_ids([1]), None))


def prompt(
    session: str, tokens: int, done: int = 0, start: int = 0, timed: bool = False, segment: tuple[int, int] = (0, 3)
) -> Waiting:
    return Waiting(SegmentPass(session, *segment, start, 4096, token_ids([1] * tokens), None, timed=timed), done)


def chosen(waiting: list[Waiting], chunk: int = 32) -> list[tuple[str, int]]:
    return [(part.waiting.work.session, part.tokens) for part in next_batch(waiting, chunk).parts]


def test_decode_steps_of_one_segment_share_a_pass_with_one_chunk_of_the_oldest_prompt() -> None:
    waiting = [step("a"), prompt("b", 100), step("c"), prompt("d", 40), step("e")]
    assert chosen(waiting) == [("a", 1), ("c", 1), ("e", 1), ("b", 32)]


def test_the_oldest_pass_decides_which_segment_runs() -> None:
    waiting = [step("a", segment=(0, 1)), step("b", segment=(2, 3)), step("c", segment=(0, 1))]
    assert chosen(waiting) == [("a", 1), ("c", 1)]


def test_a_session_has_its_oldest_pass_only_in_a_batch() -> None:
    assert chosen([prompt("a", 20), step("a", 20), step("b")]) == [("b", 1), ("a", 20)]
    assert chosen([step("a", segment=(2, 3)), step("a"), step("b", segment=(2, 3))]) == [("a", 1), ("b", 1)]


def test_chunks_end_where_a_prompt_may_be_cut() -> None:
    assert chosen([step("x"), prompt("a", 100, start=44)]) == [("x", 1), ("a", 28)]
    assert chosen([step("x"), prompt("a", 100, done=32)]) == [("x", 1), ("a", 32)]


def test_a_pass_that_is_timed_shares_its_time_with_timed_passes_only() -> None:
    assert chosen([prompt("a", 200, timed=True), step("b")]) == [("a", 200)]
    assert chosen([step("b"), prompt("a", 200, timed=True), step("c")]) == [("b", 1)]
    timed = [prompt("a", 200, timed=True), prompt("b", 1, start=9, timed=True), prompt("c", 1, start=9)]
    assert chosen(timed) == [("a", 200), ("b", 1)]
    assert chosen([prompt("a", 9, timed=True), prompt("a", 1, start=9, timed=True)]) == [("a", 9)]


def test_the_rest_of_a_prompt_goes_behind_others_but_before_later_passes_of_its_session() -> None:
    def left(waiting: list[Waiting]) -> list[tuple[str, int]]:
        return [(each.work.session, each.work.start) for each in still_waiting(waiting, next_batch(waiting, 32), 0.0)]

    assert left([step("a"), prompt("b", 100), prompt("d", 40)]) == [("d", 0), ("b", 0)]
    assert left([prompt("b", 100), prompt("d", 40), step("b", 100), prompt("e", 9)]) == [
        ("d", 0),
        ("b", 0),
        ("b", 100),
        ("e", 0),
    ]
    assert left([step("a"), prompt("b", 20)]) == []


def arrived(each: Waiting, at_s: float, late_s: float) -> Waiting:
    each.arrives(at_s, late_s)
    return each


def test_the_request_that_misses_its_objective_first_goes_first() -> None:
    detection, assistant = arrived(prompt("detection", 9), 0.1, 0.7), arrived(prompt("assistant", 9), 0.0, 2.0)
    assert chosen(in_order([assistant, detection])) == [("detection", 9)]
    steps = [arrived(step(name), 0.0, late_s) for name, late_s in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
    assert [part.waiting.work.session for part in next_batch(in_order(steps), 32, 2).parts] == ["b", "c"]


def test_what_waited_longer_than_an_objective_is_overtaken_no_more() -> None:
    old = arrived(prompt("assistant", 9), 0.0, 2.0)
    new = [arrived(prompt(str(at_s), 9), at_s, at_s + 0.6) for at_s in (1.3, 1.5)]
    assert [each.work.session for each in in_order([old, *new])] == ["1.3", "assistant", "1.5"]
    late = [arrived(step("old"), 5.0, 1.0), arrived(step("older"), 4.0, 3.0)]
    assert [each.work.session for each in in_order(late)] == ["older", "old"]  # late ones in order of arrival


def test_prompts_of_equal_objectives_take_turns_and_an_urgent_one_does_not_wait() -> None:
    long, short = arrived(prompt("long", 100), 0.0, 2.0), arrived(prompt("short", 60), 0.1, 2.1)
    waiting = still_waiting([long, short], next_batch([long, short], 32), 0.2)
    assert chosen(in_order(waiting)) == [("short", 32)]
    urgent = arrived(prompt("urgent", 100), 0.0, 0.6)
    waiting = still_waiting([urgent, short], next_batch([urgent, short], 32), 0.2)
    assert chosen(in_order(waiting)) == [("urgent", 32)]


def test_nothing_overtakes_a_timed_pass() -> None:
    waiting = [step("a"), prompt("t", 9, timed=True), arrived(step("b"), 0.0, 0.0)]
    waiting[0].arrives(0.0, 9.0)
    assert in_order(waiting) == waiting


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=12
    )
)
def test_passes_of_a_session_stay_in_order(passes: list[tuple[str, bool, float, float]]) -> None:
    waiting = [arrived(prompt(name, 3, timed=timed), at_s, late_s) for name, timed, at_s, late_s in passes]
    ordered = in_order(waiting)
    assert sorted(map(id, ordered)) == sorted(map(id, waiting))
    for name in "abc":
        assert [each for each in ordered if each.work.session == name] == [
            each for each in waiting if each.work.session == name
        ]


def test_the_decode_steps_that_waited_longest_come_first() -> None:
    waiting = [step("a"), prompt("b", 100), step("c"), step("d")]
    parts = next_batch(waiting, 32, most_decodes=2).parts
    assert [(part.waiting.work.session, part.tokens) for part in parts] == [("a", 1), ("c", 1), ("b", 32)]


def test_streams_are_shared_out_over_the_stages_of_the_chain() -> None:
    found = ChunkPace()
    assert found.fair_share(stages=2, now_s=1.0) == 1
    for number in range(8):
        found.decoded(str(number), 1.0)
    assert [found.fair_share(stages, 1.1) for stages in (1, 2, 3, 5, 9)] == [8, 4, 3, 2, 1]
    found.ended("0")
    assert found.fair_share(stages=1, now_s=1.1) == 7
    assert found.fair_share(stages=1, now_s=9.0) == 1  # none of them decodes any more


def test_a_batch_has_a_limit() -> None:
    assert len(chosen([step(str(number)) for number in range(MOST_SESSIONS + 5)])) == MOST_SESSIONS


def pace(gap_s: float, prefill_token_s: float) -> ChunkPace:
    """Two streams with this gap; the last step ended at time 1."""
    pace = ChunkPace()
    pace.timed(100, 100 * prefill_token_s)
    for session in "ab":
        pace.decoded(session, 1 - gap_s)
        pace.decoded(session, 1)
    return pace


def test_two_chunks_delay_a_stream_by_three_of_its_gaps() -> None:
    assert pace(gap_s=0.013, prefill_token_s=0.0022).chunk_tokens(1.001) == 8
    assert pace(gap_s=0.040, prefill_token_s=0.0022).chunk_tokens(1.001) == 24
    assert pace(gap_s=1.0, prefill_token_s=0.001).chunk_tokens(1.001) == 128
    assert pace(gap_s=0.001, prefill_token_s=0.1).chunk_tokens(1.001) == CHUNK_TOKENS


def test_the_shortest_chunk_is_halved_where_it_takes_more_than_its_share_of_a_gap() -> None:
    assert not ChunkPace().must_halve(CHUNK_TOKENS)
    for token_s, halve in ((0.0024, False), (0.0025, True)):  # 8 of them against 1.5 gaps of 13 ms
        assert pace(gap_s=0.013, prefill_token_s=token_s).must_halve(CHUNK_TOKENS) is halve
    slow = pace(gap_s=0.013, prefill_token_s=0.0)
    for half in (Half.FIRST, Half.SECOND):
        slow.ran(Batch(0, 3, [Part(prompt("b", 20), 8, half)]), 0.010, 1.0)  # 20 ms for all blocks
    assert slow.must_halve(CHUNK_TOKENS)


def test_only_a_chunk_beside_a_stream_is_halved_and_its_second_half_comes_before_the_next_chunk() -> None:
    long = prompt("b", 20, start=HALVED_FROM)
    assert next_batch([step("a"), prompt("b", 20)], 8, halve=True).prompt_half is Half.BOTH
    assert next_batch([long], 8, halve=True).prompt_half is Half.BOTH
    assert (
        next_batch(
            [step("a", segment=(4, 4)), prompt("b", 20, start=HALVED_FROM, segment=(4, 4))], 8, halve=True
        ).prompt_half
        is Half.BOTH
    )
    assert next_batch([step("a"), long], 8, halve=True).parts[1] == Part(long, 8, Half.FIRST)
    long.halfway = token_ids([1] * 8)
    for waiting in ([step("a"), long], [long]):
        (*_, part) = next_batch(waiting, 128).parts
        assert (part.tokens, part.done_tokens, part.half) == (8, 8, Half.SECOND)
        assert part.rows().values == long.halfway


def test_a_chunk_is_long_while_no_stream_decodes() -> None:
    assert ChunkPace().chunk_tokens(1.0) == 128
    assert pace(gap_s=0.013, prefill_token_s=0.0022).chunk_tokens(1.26) == 128


def test_a_chunk_is_short_while_a_stream_waits_that_a_long_chunk_delayed() -> None:
    assert pace(gap_s=0.013, prefill_token_s=0.0022).chunk_tokens(1.26, [step("a")]) == 8


def test_the_gap_is_that_of_a_stream_and_not_of_the_node() -> None:
    found = pace(gap_s=0.040, prefill_token_s=0.0022)
    found.ended("a")
    found.decoded("c", 1.0)
    assert found.chunk_tokens(1.001) == 24


def test_a_gap_in_which_a_prompt_ran_is_not_a_usual_one() -> None:
    found = pace(gap_s=0.040, prefill_token_s=0.0022)
    found.prefilled(1.1)
    found.decoded("a", 1.2)
    assert found.chunk_tokens(1.2) == 24
    found.decoded("a", 1.3)
    assert found.chunk_tokens(1.3) == 32


def test_the_tokens_of_a_prompt_beside_streams_take_what_the_streams_do_not() -> None:
    found = ChunkPace()
    found.ran(Batch(0, 3, [Part(step("a"), 1)]), 0.030, 0.97)
    found.ran(Batch(0, 3, [Part(step("a"), 1)]), 0.030, 1.00)  # a gap of 30 ms
    found.ran(Batch(0, 3, [Part(step("a"), 1), Part(prompt("b", 20), 20)]), 0.060, 1.06)  # 1.5 ms a token
    assert found.chunk_tokens(1.061) == 24  # 45 ms / 1.5 ms = 30


def away(away_s: float = 0.002) -> ChunkPace:
    """Streams a and b decode with a gap of 40 ms; both were away for `away_s`, and b is since time 1."""
    found = ChunkPace()
    for end_s in (0.96, 1.0):
        for session in "ab":
            found.arrived(step(session).work, end_s - 0.04 + away_s)
        found.ran(Batch(0, 3, [Part(step(session), 1) for session in "ab"]), 0.038, end_s)
    return found


def test_a_pass_waits_for_the_streams_that_are_about_to_come_back() -> None:
    found = away()
    found.arrived(step("a").work, 1.001)
    assert found.join_until_s([step("a")], 1.001, 1.001, 2) == pytest.approx(1.0 + 2 * 0.0018)
    assert found.join_until_s([prompt("c", 100)], 1.001, 1.001, 2) > 1.001
    found.arrived(step("b").work, 1.002)
    assert found.join_until_s([step("a"), step("b")], 1.001, 1.002, 2) <= 1.002


def test_a_pass_waits_for_no_stream_that_is_late_far_away_ended_or_in_another_pass() -> None:
    def begins_at_once(found: ChunkPace, waiting: list[Waiting], now_s: float = 1.001, most_decodes: int = 2) -> bool:
        return found.join_until_s(waiting, 1.001, now_s, most_decodes) <= now_s

    assert not begins_at_once(away(), [step("c")])
    assert begins_at_once(ChunkPace(), [step("c")])
    assert begins_at_once(away(), [step("c")], now_s=1.0041)
    assert begins_at_once(away(away_s=0.02), [step("c")])
    assert begins_at_once(away(), [step("c", segment=(4, 5))])
    assert begins_at_once(away(), [step("c")], most_decodes=1)
    assert begins_at_once(away(), [prompt("c", 9, timed=True)])
    ended = away()
    for session in "ab":
        ended.ended(session)
    assert begins_at_once(ended, [step("c")])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 200), st.booleans()), min_size=1, max_size=20))
def test_all_that_waits_is_done_in_order_for_each_session(arrivals: list[tuple[int, int, bool]]) -> None:
    positions: dict[int, int] = {}
    waiting: list[Waiting] = []
    for session, tokens, decodes in arrivals:
        start = positions.get(session, 0)
        tokens = 1 if decodes and start else tokens
        waiting.append(prompt(str(session), tokens, start=start))
        positions[session] = start + tokens
    computed: dict[str, int] = {}
    for _ in range(1000):
        if not waiting:
            break
        for part in next_batch(waiting, 32).parts:
            work = part.waiting.work
            assert computed.get(work.session, 0) == work.start + part.waiting.done
            computed[work.session] = work.start + part.waiting.done + part.tokens
            part.waiting.done += part.tokens
            assert part.waiting.done == work.tokens or (work.start + part.waiting.done) % CHUNK_TOKENS == 0
        waiting = [each for each in waiting if each.done < each.work.tokens]
    assert computed == {str(session): end for session, end in positions.items()}
