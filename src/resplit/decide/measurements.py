"""What past requests and epochs say to the orchestrator: measured latency, pace of loading, and how often it moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from resplit.decide.state import Measured, Settings
from resplit.epochs import LiveEpoch
from resplit.session_records import SessionRecord

__all__ = ["for_a_change", "measured_since", "registry_bytes_per_s"]

_MOST_MOVES, _WITHIN_S = 3, 20.0


def measured_since(
    records: Sequence[SessionRecord], slo_s: Mapping[str, float | None], since_s: float
) -> Measured | None:
    """The latency of the completed requests that arrived at `since_s` or later (seconds since 1970).

    `slo_s` gives the service objective of each class; a class misses it if its mean latency is above it. None if no
    such request completed.
    """
    completed = [record for record in records if record.arrival_s >= since_s and record.status == 200]
    if not completed:
        return None
    latency_s = np.array([record.end_s - record.arrival_s for record in completed])  # (requests,)
    class_of = np.array([record.request_class for record in completed])
    missed = [
        name
        for name, limit_s in slo_s.items()
        if limit_s is not None and (class_of == name).any() and latency_s[class_of == name].mean() > limit_s
    ]
    error_s = float(latency_s.std()) / math.sqrt(len(completed))
    return Measured(float(latency_s.mean()), len(completed), tuple(sorted(missed)), error_s)


def registry_bytes_per_s(epochs: Sequence[LiveEpoch]) -> float | None:
    """Bytes of weights per second that a node fetches and loads, over all `epochs`; None if they loaded none.

    An epoch waits for the node that loads most.
    """
    loading = [epoch for epoch in epochs if epoch.longest_load_bytes > 0]
    seconds = sum(epoch.prepare_s for epoch in loading)
    return sum(epoch.longest_load_bytes for epoch in loading) / seconds if seconds > 0 else None


def _moved_often(epochs: Sequence[LiveEpoch], now_s: float) -> bool:
    """Whether so many epochs went live lately that a move at a detected change must wait for the cooldown, too."""
    return sum(epoch.committed_s > now_s - _WITHIN_S for epoch in epochs) >= _MOST_MOVES


def for_a_change(settings: Settings, epochs: Sequence[LiveEpoch], now_s: float) -> Settings:
    """The settings for a decision on a detected change: without cooldown, unless the cluster moved often lately.

    A detected change is not noise, unless there is one after the other. Nodes load blocks at the rate that was seen in
    `epochs`. `now_s` is in seconds since 1970.
    """
    cooldown_s = settings.cooldown_s if _moved_often(epochs, now_s) else 0.0
    return replace(settings, cooldown_s=cooldown_s, registry_bytes_per_s=registry_bytes_per_s(epochs))
