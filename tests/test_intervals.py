"""Means over seeds, their intervals, and differences that are paired by seed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from resplit.intervals import interval, study_metrics
from resplit.metrics import RunMetrics, summarise
from tests.support.run_tables import record, request


def run(latency_s: float, qos_met: float = 1.0) -> RunMetrics:
    return replace(summarise(record([request(0.0, latency_s)])), qos_met=qos_met)


def test_an_interval_is_that_of_student() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-6)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [interval(list(rng.normal(5.0, 2.0, 3))) for _ in range(4000)]
    covered = np.mean([abs(mean - 5.0) <= half for mean, half in found])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_what_is_not_known_has_no_interval() -> None:
    assert interval([4.0, math.nan])[0] == 4.0
    assert math.isnan(interval([4.0])[1])
    assert all(map(math.isnan, interval([math.nan])))


def test_policies_are_compared_seed_by_seed() -> None:
    runs = {
        "static": {1: run(4.0, 0.5), 2: run(8.0, 0.7), 3: run(1.0)},
        "adaptive": {1: run(2.0, 0.9), 2: run(2.0, 0.9)},
    }
    metrics = study_metrics(runs)
    assert metrics["adaptive"]["static_over_latency"][0] == pytest.approx(3.0)
    assert metrics["adaptive"]["latency_minus_static_s"][0] == pytest.approx(-4.0)
    assert metrics["adaptive"]["qos_minus_static"] == pytest.approx((0.3, 12.706 * 0.1), rel=1e-3)
    assert metrics["static"]["latency_minus_static_s"] == (0.0, 0.0)
    assert metrics["static"]["latency_mean_s"][0] == pytest.approx(13 / 3)
    assert metrics["static"]["seeds"][0] == 3
    alone = study_metrics({"adaptive": {1: run(1.0)}})["adaptive"]
    assert math.isnan(alone["static_over_latency"][0])
