"""How long a batch takes by the cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from resplit.cost.features import design
from resplit.cost.model import CostModel, Phase
from resplit.pass_times import SegmentTime
from resplit.types import BlockFeatures

__all__ = ["ExpectedTimes"]

_CONTEXT_STEP = 32  # tokens; batches with contexts in the same step are expected to take the same time
_Key = tuple[str, int, int, int, int, int]
_Bounds = tuple[float, float]


class ExpectedTimes:
    """The times of batches by one cost model, remembered: the same batches come again and again."""

    def __init__(self, model: CostModel, features: Sequence[BlockFeatures]) -> None:
        self._model = model
        self._features = features
        self._known: dict[_Key, _Bounds | None] = {}

    def batch_s(self, node: str, segment: SegmentTime, context_tokens: float) -> tuple[float, float] | None:
        """The least and the most seconds of the batch without background load, after `context_tokens` cached ones.

        They are equal, but for a batch that mixes decode steps with a prompt. The model has no such passes. They take
        as long as both one after the other, or less by what a pass takes for all its tokens together. None for a node
        or a kind of block that the model does not know.
        """
        step = int(context_tokens) // _CONTEXT_STEP
        key = (node, segment.first, segment.last, segment.decodes, segment.prefill_tokens, step)
        if key not in self._known:
            self._known[key] = self._batch_s(segment, node, (step + 0.5) * _CONTEXT_STEP)
        return self._known[key]

    def reference_s(self, node: str) -> float | None:
        """The time of the reference layer on a node when the model was fitted; None if it is not known."""
        known_s = self._model.reference_s.get(node, math.nan)
        return known_s if known_s > 0 else None

    def _batch_s(self, segment: SegmentTime, node: str, context_tokens: float) -> _Bounds | None:
        decodes, prefill = segment.decodes, segment.prefill_tokens
        parts: list[tuple[Phase, int, float]] = [("decode", decodes, context_tokens), ("prefill", prefill, 0.0)]
        parts_s = [self._part_s(segment, node, *part) for part in parts if part[1]]
        known_s = [seconds for seconds in parts_s if seconds is not None]
        if not known_s or len(known_s) < len(parts_s):
            return None
        most_s = sum(known_s)
        shared_s = self._part_s(segment, node, "decode", 0, 0.0) or 0.0 if len(known_s) > 1 else 0.0
        return max(most_s - shared_s, *known_s), most_s

    def _part_s(
        self, segment: SegmentTime, node: str, phase: Phase, tokens: int, context_tokens: float
    ) -> float | None:
        """Seconds of the decode steps or of the prompt of a batch; without any tokens, what all of them share."""
        if segment.last >= len(self._features):
            return None
        counts: dict[tuple[object, ...], tuple[BlockFeatures, int]] = {}
        for feature in self._features[segment.first : segment.last + 1]:
            shape = (feature.kind, feature.flops_per_token, feature.flops_per_context_token, feature.weight_bytes)
            counts[shape] = (feature, counts.get(shape, (feature, 0))[1] + 1)
        total_s = 0.0
        for feature, count in counts.values():
            fit = self._model.find(node, phase, feature.kind)
            if fit is None:
                return None
            row = design(feature, tokens, context_tokens, max(1, tokens) if phase == "decode" else 1)
            total_s += count * float((row @ np.array(fit.coefficients))[0])
        return total_s if total_s > 0 else None
