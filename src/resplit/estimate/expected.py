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


class ExpectedTimes:
    """The times of batches by one cost model, remembered: the same batches come again and again."""

    def __init__(self, model: CostModel, features: Sequence[BlockFeatures]) -> None:
        self._model = model
        self._features = features
        self._known: dict[_Key, float | None] = {}

    def batch_s(self, node: str, segment: SegmentTime, context_tokens: float) -> float | None:
        """Seconds of the batch without background load, after `context_tokens` cached ones.

        None for a node or a kind of block that the model does not know, and for a batch that mixes decode steps with a
        prompt: the model has no such passes.
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

    def _batch_s(self, segment: SegmentTime, node: str, context_tokens: float) -> float | None:
        decodes, prefill = segment.decodes, segment.prefill_tokens
        if bool(decodes) == bool(prefill) or segment.last >= len(self._features):
            return None
        phase: Phase = "decode" if decodes else "prefill"
        counts: dict[tuple[object, ...], tuple[BlockFeatures, int]] = {}
        for feature in self._features[segment.first : segment.last + 1]:
            shape = (feature.kind, feature.flops_per_token, feature.flops_per_context_token, feature.weight_bytes)
            counts[shape] = (feature, counts.get(shape, (feature, 0))[1] + 1)
        total_s = 0.0
        for feature, count in counts.values():
            fit = self._model.find(node, phase, feature.kind)
            if fit is None:
                return None
            context = context_tokens if decodes else 0.0
            row = design(feature, decodes or prefill, context, decodes or 1)
            total_s += count * float((row @ np.array(fit.coefficients))[0])
        return total_s if total_s > 0 else None
