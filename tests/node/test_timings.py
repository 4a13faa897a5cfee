"""Which blocks of a batch are timed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from resplit.model.activation import of_array
from resplit.node.batching import Batch, Part, SegmentPass, Waiting
from resplit.node.timings import Timing, timings_of

KINDS = ("embed", "layer", "layer", "layer", "head")
BLOCK_S = (0.1, 0.2, 0.3, 0.4)  # of blocks 1 to 4


def test_one_block_of_each_kind_is_timed_and_each_turn_takes_another() -> None:
    timed = [[(each.block, each.seconds) for each in timings(decoding("a", 6), turn=turn)] for turn in range(4)]
    assert timed == [[(1, 0.1), (4, 0.4)], [(2, 0.2), (4, 0.4)], [(3, 0.3), (4, 0.4)], [(1, 0.1), (4, 0.4)]]


def test_a_timing_has_the_tokens_and_the_mean_context_of_all_sessions() -> None:
    timing = timings(decoding("a", 4), decoding("b", 9))[0]
    assert (timing.sessions, timing.tokens, timing.context_tokens, timing.phase) == (2, 2, 6, "decode")


def test_nothing_is_timed_where_decode_steps_and_a_prompt_share_a_pass() -> None:
    assert timings(decoding("a", 4), work("b", 0, tokens=8)) == []


def test_nothing_is_timed_of_a_pass_that_runs_position_by_position() -> None:
    assert timings(replace(decoding("a", 4), stepwise=True)) == []


def timings(*works: SegmentPass, turn: int = 0) -> list[Timing]:
    batch = Batch(1, 4, [Part(Waiting(each), each.tokens) for each in works])
    return timings_of(batch, KINDS, BLOCK_S, turn, now_s=0.0)


def decoding(session: str, start: int) -> SegmentPass:
    return work(session, start, tokens=1)


def work(session: str, start: int, tokens: int) -> SegmentPass:
    return SegmentPass(session, 1, 4, start, 64, of_array(np.zeros((1, tokens, 2), np.float32)), None)
