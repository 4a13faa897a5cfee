"""Runs side by side: means over seeds, intervals, and regret paired by seed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from resplit.metrics import RunMetrics
from resplit.simulate.comparison import compared_runs, table_of
from resplit.simulate.result import SimulatedResult


def run(policy: str, seed: int, latency_s: float) -> SimulatedResult:
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(RunMetrics)), math.nan)
    metrics = RunMetrics(**nothing | {"latency_mean_s": latency_s})  # type: ignore[arg-type]  # NaN for counts
    return SimulatedResult(policy, "calm", seed, 60.0, 9.0, math.nan, metrics)


RUNS = [run("static", 1, 1.0), run("static", 2, 3.0), run("oracle", 1, 0.5), run("oracle", 2, 1.0)]


def test_regret_is_paired_by_seed() -> None:
    static = compared_runs(RUNS)["calm"]["static"]
    assert static["latency_mean_s"][0] == pytest.approx(2.0)
    assert static["latency_mean_s"][1] == pytest.approx(12.706, rel=1e-3)
    assert static["regret"][0] == pytest.approx((2.0 + 3.0) / 2)
    assert "wall_s" not in static


def test_without_an_oracle_or_a_latency_there_is_no_regret() -> None:
    assert math.isnan(compared_runs(RUNS[:2])["calm"]["static"]["regret"][0])
    none = compared_runs([run("static", 1, math.nan), run("oracle", 1, 0.5)])
    assert math.isnan(none["calm"]["static"]["regret"][0])


def test_what_an_ablation_loses_is_paired_by_seed() -> None:
    runs = [run("resplit", 1, 1.0), run("resplit", 2, 2.0), run("resplit-without-forecast", 1, 1.1)]
    compared = compared_runs([*runs, run("resplit-without-forecast", 2, 2.6)])["calm"]
    mean, half = compared["resplit-without-forecast"]["latency_over_resplit"]
    assert mean == pytest.approx((1.1 + 1.3) / 2)
    assert half == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert compared["resplit"]["latency_over_resplit"] == pytest.approx((1.0, 0.0))
    assert math.isnan(compared_runs(RUNS)["calm"]["static"]["latency_over_resplit"][0])


def test_the_table_has_the_best_policy_first_and_no_nan() -> None:
    lines = table_of(compared_runs(RUNS)).splitlines()
    assert lines[2].startswith("| calm | oracle | 0.75 ±")
    assert lines[3].startswith("| calm | static | 2 ±")
    assert "nan" not in "".join(lines)
