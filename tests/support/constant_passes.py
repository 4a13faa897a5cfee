"""Passes along the live route that take the time of a constant cost model, told to the fast loop."""

from __future__ import annotations

import asyncio

from resplit.control.controller import Controller
from resplit.cost import CostModel, PassModel, PredictionError
from resplit.pass_times import PassTime, SegmentTime
from resplit.types import segments_of
from tests.support.three_nodes import A, B, C

LAYER_S = 0.03
PASS_S = 0.15
NO_ERROR = PredictionError(None, None, 0)
KINDS = ("embed", "layer", "head")


def constant_model() -> CostModel:
    """A model in which every pass through a block takes `LAYER_S`."""
    passes = tuple(
        PassModel(node, phase, kind, (LAYER_S, 0.0, 0.0, 0.0, 0.0), (0.0,) * 5, 1, 0.0)
        for node in (A, B, C)
        for phase in ("prefill", "decode")
        for kind in KINDS
    )
    return CostModel(0.0, dict.fromkeys((A, B, C), LAYER_S), passes, (), NO_ERROR, NO_ERROR)


def pass_time(controller: Controller, slow: dict[str, float], now_s: float) -> PassTime:
    """A decode step along the live route; nodes in `slow` take so many times longer."""
    assert controller.live is not None
    segments = tuple(
        SegmentTime(
            segment.node,
            segment.first,
            segment.last,
            waited_s=0.0,
            computed_s=LAYER_S * (segment.last - segment.first + 1) * slow.get(segment.node, 1.0),
            background_utilization=0.0,
            decodes=1,
            prefill_tokens=0,
        )
        for segment in segments_of(controller.live.placement)
    )
    return PassTime(controller.live.epoch, 20, 1, now_s, 0.0, segments)


def serve(controller: Controller, passes: int, **slow: float) -> None:
    """Tell the fast loop of passes that end one after the other, after those that it was told of before."""
    seen = [each.at_s for each in controller.fast_loop.recording().observations if each.done]
    begun_s = max([asyncio.get_running_loop().time(), *seen])
    for index in range(1, passes + 1):
        controller.fast_loop.passed(pass_time(controller, slow, begun_s + index * PASS_S))
