"""Two nodes, "near" and "far", with two layers each: their cost model, passes with and without noise, recordings."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from resplit.cost import CostModel, LinkModel, PassModel, PredictionError
from resplit.estimate import LinkSeen, NodeSeen, Observation, Recording
from resplit.pass_times import PassTime, SegmentTime
from resplit.types import BlockFeatures

PASSES = 3000  # of a recording
EVERY_S = 0.2  # two streams, each with a token in 0.4 s
NOISE = 0.03  # of a time, as a share
HICCUP_S = 0.03  # mean delay of a host that does something else for a moment
STALLS = 0.001  # share of times that are late: at each node one in 100 s
LAYER_S = {"near": 0.02, "far": 0.04}
FIXED = (1.0, 0.0, 0.0, 0.0, 0.0)
NO_ERROR = PredictionError(None, None, 0)


def feature(name: str, kind: Literal["embed", "layer", "head"]) -> BlockFeatures:
    return BlockFeatures(
        name=name,
        kind=kind,
        parameters=10,
        flops_per_token=20.0,
        flops_per_context_token=1.0,
        weight_bytes=40.0,
        kv_bytes_per_token=8.0,
        activation_bytes_per_token=8.0,
        private=False,
        sensitivity=0.5,
    )


FEATURES = tuple(feature(f"layer.{index}", "layer") for index in range(4))


def model(factors: dict[str, float] | None = None) -> CostModel:
    """A model in which every pass through a layer takes the same time on a node, times a factor."""
    factors = factors or {}
    times_s = {node: seconds * factors.get(node, 1.0) for node, seconds in LAYER_S.items()}
    passes = tuple(
        PassModel(node, phase, "layer", tuple(seconds * part for part in FIXED), FIXED, 1, 0.0)
        for node, seconds in times_s.items()
        for phase in ("prefill", "decode")
    )
    return CostModel(0.0, times_s, passes, (), NO_ERROR, NO_ERROR)


def a_pass(at_s: float, factors: dict[str, float] | None = None, background: float = 0.0, decodes: int = 1) -> PassTime:
    """A pass through two layers on each node, which take the model's times times a factor."""
    factors = factors or {}
    segments = tuple(
        SegmentTime(
            node,
            first,
            first + 1,
            waited_s=0.001,
            computed_s=2 * LAYER_S[node] * factors.get(node, 1.0) / (1 - background),
            background_utilization=background,
            decodes=decodes,
            prefill_tokens=0 if decodes else 8,
        )
        for node, first in (("near", 0), ("far", 2))
    )
    return PassTime(1, 20, 1, at_s, 0.05, segments)


def delayed(rng: np.random.Generator, seconds: float, share: float) -> float:
    """A time with noise, which is late with a probability of `share`."""
    late_s = float(rng.exponential(HICCUP_S)) if rng.random() < share else 0.0
    return float(seconds * np.exp(NOISE * rng.standard_normal()) + late_s)


def calm_pass(rng: np.random.Generator, at_s: float) -> PassTime:
    done = a_pass(at_s)
    segments = []
    for segment in done.segments:
        first_s, second_s = (delayed(rng, segment.computed_s / 2, STALLS) for _ in range(2))
        segments.append(replace(segment, computed_s=first_s + second_s, first_half_s=first_s))
    computed_s = sum(segment.computed_s + segment.waited_s for segment in segments)
    return replace(done, segments=tuple(segments), total_s=computed_s + delayed(rng, 0.02, STALLS))


def linked(cost: CostModel) -> CostModel:
    pairs = [(one, other) for one in LAYER_S for other in LAYER_S if one != other]
    return replace(cost, links=tuple(LinkModel(one, other, 0.004, 1 / 4e7, 0.0, 0.0, 9) for one, other in pairs))


def recorded(seed: int, slow_from: int = PASSES) -> Recording:
    """Passes and probes with noise and stalls. The node "far" is twice as slow from pass `slow_from` on."""
    rng = np.random.default_rng(seed)
    seen = [Observation(0.0, cost=linked(model())), Observation(0.0, node=NodeSeen("spare", float("nan"), 0.1))]
    for index, at_s in enumerate(np.arange(0.0, PASSES * EVERY_S, EVERY_S).tolist()):
        done = calm_pass(rng, at_s)
        if index >= slow_from:
            near, far = done.segments
            far = replace(far, computed_s=2 * far.computed_s, first_half_s=2 * far.first_half_s)
            done = replace(done, segments=(near, far))
        seen.append(Observation(at_s, done=done))
        if index % 10 == 0:
            seen += [Observation(at_s, link=LinkSeen("near", "far", 64, 0.004 * float(rng.uniform(1.0, 1.5))))]
    return Recording(FEATURES, "near", tuple(seen))
