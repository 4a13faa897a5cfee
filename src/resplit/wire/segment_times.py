"""Reads the times that a token brings from the segments of its route."""

from __future__ import annotations

import math

from resplit.pass_times import SegmentTime
from resplit.wire.node_pb2 import SegmentTime as SegmentTimeMessage
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route

_LONGEST_S = 3600.0
_MOST = 1_000_000  # sessions or tokens in a batch


def segment_times(answer: Token, route: Route) -> tuple[SegmentTime, ...]:
    """The times of all segments of `route`; empty if they are not complete, or are times of no batch.

    Any host of the route may have changed them, so they are no reason to hold anything against one.
    """
    if len(answer.times) != len(route.segments) or not all(map(_plausible, answer.times)):
        return ()
    return tuple(
        SegmentTime(
            segment.node,
            segment.first,
            segment.last,
            time.waited_s,
            time.computed_s,
            time.background_utilization,
            time.decodes,
            time.prefill_tokens,
            time.first_half_s,
        )
        for segment, time in zip(route.segments, answer.times, strict=True)
    )


def _plausible(time: SegmentTimeMessage) -> bool:
    seconds = math.isfinite(time.waited_s + time.computed_s + time.first_half_s)
    seconds = seconds and min(time.waited_s, time.computed_s, time.first_half_s) >= 0
    share = 0 <= time.background_utilization < 1
    return (
        seconds
        and share
        and time.waited_s + time.computed_s < _LONGEST_S
        and time.decodes + time.prefill_tokens <= _MOST
    )
