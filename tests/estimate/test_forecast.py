"""Forecasts: rates of requests and values that return to their mean, with honest deviations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from resplit.estimate.forecast import AHEAD_S, ArrivalRate, Reverting


def poisson_s(rng: np.random.Generator, rate_rps: float, from_s: float, until_s: float) -> list[float]:
    count = rng.poisson(rate_rps * (until_s - from_s))
    return np.sort(rng.uniform(from_s, until_s, count)).tolist()


def after(rate: ArrivalRate, arrivals_s: list[float]) -> ArrivalRate:
    for at_s in arrivals_s:
        rate.arrived(at_s)
    return rate


def test_before_any_request_the_declared_rate_is_expected_without_much_certainty() -> None:
    forecast = ArrivalRate(2.0, 100.0).forecast(100.0)
    assert forecast.mean == pytest.approx(2.0)
    assert 0.2 < forecast.deviation < 1.0


@pytest.mark.parametrize("rate_rps", [0.2, 1.5, 6.0])
def test_a_rate_that_lasts_becomes_well_known_whatever_was_declared(rate_rps: float) -> None:
    forecasts = [
        after(ArrivalRate(1.0, 0.0), poisson_s(np.random.default_rng(seed), rate_rps, 0.0, 600.0)).forecast(600.0)
        for seed in range(20)
    ]
    errors = [forecast.mean - rate_rps for forecast in forecasts]
    assert abs(float(np.mean(errors))) < 0.1 * rate_rps + 0.03
    # The deviations say how large the errors are.
    assert 0.4 < float(np.sqrt(np.mean(np.square(errors)))) / np.mean([each.deviation for each in forecasts]) < 1.6


def test_a_surge_is_followed_after_some_requests_and_its_end_is_seen_although_no_request_comes() -> None:
    halves, quiet = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rate = after(ArrivalRate(1.0, 0.0), poisson_s(rng, 1.0, 0.0, 300.0))
        halves.append(after(rate, poisson_s(rng, 4.0, 300.0, 310.0)).forecast(310.0).mean)
        quiet.append(rate.forecast(325.0).mean)
    assert np.mean(halves) > 2.5
    assert np.mean(quiet) < 1.0


def test_requests_that_come_at_one_moment_or_out_of_order_give_a_rate() -> None:
    rate = after(ArrivalRate(1.0, 10.0), [11.0, 11.0, 10.5, 11.0])
    assert 0 < rate.forecast(9.0).mean < math.inf


def test_a_class_that_nobody_asks_for_keeps_a_little_of_its_declared_rate() -> None:
    forecast = ArrivalRate(1.0, 0.0).forecast(3600.0)
    assert 0 < forecast.mean < 0.05


def wandering(rng: np.random.Generator, memory_s: float, until_s: float) -> list[tuple[float, float]]:
    """A share that returns to 0.4 within about `memory_s`, every two seconds."""
    value, found = 0.4, []
    for at_s in np.arange(0.0, until_s, 2.0).tolist():
        kept = math.exp(-2.0 / memory_s)
        value = 0.4 + kept * (value - 0.4) + 0.1 * math.sqrt(1 - kept**2) * float(rng.standard_normal())
        found.append((at_s, value))
    return found


def test_a_value_that_wanders_returns_to_its_mean_once_that_was_seen_often() -> None:
    level = Reverting()
    for at_s, value in wandering(np.random.default_rng(1), 20.0, 3600.0):
        level.observe(value, at_s)
    forecast = level.forecast(0.7, 3600.0)
    assert forecast.mean == pytest.approx(0.4, abs=0.08)
    assert forecast.deviation == pytest.approx(0.1, rel=0.4)


def test_a_value_that_stays_for_long_is_expected_to_stay() -> None:
    level = Reverting()
    for at_s, value in wandering(np.random.default_rng(2), 50 * AHEAD_S, 20 * AHEAD_S):
        level.observe(value, at_s)
    now = level.forecast(0.7, 20 * AHEAD_S)
    assert now.mean > 0.55


def test_what_was_hardly_seen_is_expected_to_stay() -> None:
    level = Reverting()
    assert level.forecast(0.8, 0.0).mean == 0.8
    for at_s, value in wandering(np.random.default_rng(3), 20.0, 2 * AHEAD_S):
        level.observe(value, at_s)
    level.observe(math.nan, 2 * AHEAD_S)
    assert level.forecast(0.8, 2 * AHEAD_S).mean == 0.8
    assert level.forecast(0.8, 2 * AHEAD_S).deviation > 0


def test_a_constant_value_is_expected_without_any_doubt() -> None:
    level = Reverting()
    for at_s in np.arange(0.0, 20 * AHEAD_S, 2.0).tolist():
        level.observe(0.3, at_s)
    forecast = level.forecast(0.3, 20 * AHEAD_S)
    assert (forecast.mean, forecast.deviation) == pytest.approx((0.3, 0.0), abs=1e-6)
