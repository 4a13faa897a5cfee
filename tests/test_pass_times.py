"""Sums of the times of passes."""

from __future__ import annotations

import pytest

from resplit.pass_times import PassTime, SegmentTime, TimeByNode


def test_the_time_of_passes_is_summed_by_part_and_by_node() -> None:
    segments = (
        SegmentTime("a", 0, 3, waited_s=0.1, computed_s=0.4, background_utilization=0.0, decodes=1, prefill_tokens=0),
        SegmentTime("b", 4, 7, waited_s=0.0, computed_s=0.2, background_utilization=0.0, decodes=1, prefill_tokens=0),
    )
    spent = TimeByNode()
    for _ in range(2):
        spent.add(PassTime(1, 9, 1, 5.0, 1.0, segments))
    assert (spent.passes, spent.waited_s, spent.computed_s) == (2, 0.2, pytest.approx(1.2))
    assert spent.hops_s == pytest.approx(0.6)
    assert {name: (node.waited_s, node.computed_s) for name, node in spent.nodes.items()} == {
        "a": (0.2, 0.8),
        "b": (0.0, 0.4),
    }


def test_the_halves_of_a_segment_have_its_blocks_and_its_time() -> None:
    segment = SegmentTime("a", 2, 6, 0.1, 0.5, 0.0, 1, 0, first_half_s=0.2)
    first, second = segment.halves()
    assert [(half.first, half.last, half.computed_s) for half in (first, second)] == [
        (2, 3, 0.2),
        (4, 6, pytest.approx(0.3)),
    ]
    assert first.halves() == (first,)
    for prompt_half, tokens in ((0, [8, 8]), (1, [8, 0]), (2, [0, 8])):
        mixed = SegmentTime("a", 2, 6, 0.1, 0.5, 0.0, 1, 8, first_half_s=0.2, prompt_half=prompt_half)
        assert [(half.prefill_tokens, half.prompt_half) for half in mixed.halves()] == [(each, 0) for each in tokens]
    for first_half_s in (0.0, 0.5, 0.7, -1.0):  # not known, or no time of a part
        whole = SegmentTime("a", 2, 6, 0.1, 0.5, 0.0, 1, 0, first_half_s=first_half_s)
        assert whole.halves() == (whole,)
