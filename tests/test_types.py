"""The values of the placement problem."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from resplit.types import BlockFeatures, Segment, segments_of

PLACEMENTS = st.lists(st.sampled_from("abc"), max_size=12).map(tuple)


@given(PLACEMENTS)
def test_segments_are_maximal_and_cover_a_placement_once(placement: tuple[str, ...]) -> None:
    segments = segments_of(placement)
    covered = [(b, segment.node) for segment in segments for b in range(segment.first, segment.last + 1)]
    assert covered == list(enumerate(placement))
    assert len(segments) == len(list(groupby(placement)))


def test_a_node_may_hold_several_segments() -> None:
    assert segments_of(("a", "b", "b", "a")) == (Segment(0, 0, "a"), Segment(1, 2, "b"), Segment(3, 3, "a"))


def test_a_block_keeps_the_features_that_the_planner_uses() -> None:
    features = BlockFeatures("layer.0", "layer", 10, 20.0, 2.0, 40.0, 8.0, 16.0, True, 0.5)
    block = features.block()
    assert (block.name, block.weight_bytes, block.kv_bytes_per_token) == ("layer.0", 40.0, 8.0)
    assert (block.activation_bytes_per_token, block.private, block.sensitivity) == (16.0, True, 0.5)
