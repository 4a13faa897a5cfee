"""Means over seeds with 95 % intervals, and differences between policies that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from scipy import stats

from resplit.metrics import RunMetrics

__all__ = ["Interval", "interval", "study_metrics"]

Interval = tuple[float, float]  # the mean, and half of the width of its interval
_LEVEL = 0.95
_BASELINE = "static"


def interval(values: Sequence[float]) -> Interval:
    """The mean of the known values, and the half-width of Student's interval; NaN where too few are known."""
    known = np.array([value for value in values if math.isfinite(value)])
    if len(known) == 0:
        return math.nan, math.nan
    if len(known) == 1:
        return float(known[0]), math.nan
    half = stats.t.ppf((1 + _LEVEL) / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known))
    return float(known.mean()), float(half)


def study_metrics(runs: Mapping[str, Mapping[int, RunMetrics]]) -> dict[str, dict[str, Interval]]:
    """The metrics of each policy over its seeds: `runs` has one run for each policy, by its label, and seed.

    Each is that of `comparison.with_other_runs`. Added are, paired by seed: `static_over_latency` (mean latency of
    static over that of the policy), `latency_minus_static_s` and `qos_minus_static`. They are NaN where static was not
    run.
    """
    return {label: _metrics(by_seed) | _paired(by_seed, runs.get(_BASELINE, {})) for label, by_seed in runs.items()}


def _metrics(by_seed: Mapping[int, RunMetrics]) -> dict[str, Interval]:
    rows = [asdict(metrics) for metrics in by_seed.values()]
    return {name: interval([float(row[name]) for row in rows]) for name in rows[0]} | {
        "seeds": (float(len(rows)), math.nan)
    }


def _paired(by_seed: Mapping[int, RunMetrics], static: Mapping[int, RunMetrics]) -> dict[str, Interval]:
    pairs = [(own, static[seed]) for seed, own in by_seed.items() if seed in static]
    return {
        "static_over_latency": interval([base.latency_mean_s / own.latency_mean_s for own, base in pairs]),
        "latency_minus_static_s": interval([own.latency_mean_s - base.latency_mean_s for own, base in pairs]),
        "qos_minus_static": interval([own.qos_met - base.qos_met for own, base in pairs]),
    }
