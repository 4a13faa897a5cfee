"""Reads the times that a token brings from the segments of its route."""

from __future__ import annotations

import math

from resplit.pass_times import SegmentTime
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route

_LONGEST_S = 3600.0
_MOST = 1_000_000  # sessions or tokens in a batch


def segment_times(answer: Token, route: Route) -> tuple[SegmentTime, ...]:
    """The times of all segments of `route`; empty if they are not complete, or are times of no batch.

    Any host of the route may have changed them, so they are no reason to hold anything against one.
    """
    if len(answer.times) != len(route.segments):
        return ()
    times = []
    for segment, told in zip(route.segments, answer.times, strict=True):
        waited_s, computed_s, first_half_s = told.waited_s, told.computed_s, told.first_half_s
        background, decodes, prefill_tokens = told.background_utilization, told.decodes, told.prefill_tokens
        # Each comparison is false for NaN.
        seconds = 0 <= waited_s < _LONGEST_S and 0 <= computed_s < _LONGEST_S and 0 <= first_half_s < math.inf
        if not (seconds and waited_s + computed_s < _LONGEST_S and 0 <= background < 1):
            return ()
        if decodes + prefill_tokens > _MOST or told.prompt_half > 2:
            return ()
        times.append(
            SegmentTime(
                segment.node,
                segment.first,
                segment.last,
                waited_s,
                computed_s,
                background,
                decodes,
                prefill_tokens,
                first_half_s,
                told.prompt_half,
            )
        )
    return tuple(times)
