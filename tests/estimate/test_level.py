"""The filter of a local level, and its test for jumps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.estimate import Level

NOISE = 0.05


def level_after(values: list[float], every_s: float = 0.1) -> tuple[Level, list[int]]:
    """A level that has seen these values, and the indices of those that raised an alarm."""
    level = Level(NOISE, drift=0.01, least=0.15)
    return level, [index for index, value in enumerate(values) if level.observe(value, index * every_s)]


def noise(seed: int, count: int, deviation: float = NOISE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, deviation, count)


@pytest.mark.parametrize("jump", [-1.6, -0.7, 0.7, 1.6])
@pytest.mark.parametrize("seed", range(5))
def test_a_jump_is_noticed_at_the_second_value_and_the_level_is_then_right(jump: float, seed: int) -> None:
    level, alarms = level_after([*noise(seed, 50), *(jump + noise(seed + 100, 3))])
    assert alarms == [51]
    assert level.mean == pytest.approx(jump, abs=4 * NOISE)


def test_one_outlier_is_no_jump_and_moves_the_level_little() -> None:
    level, alarms = level_after([*noise(1, 50), 3.0, *noise(2, 20)])
    assert alarms == []
    assert level.mean == pytest.approx(0.0, abs=NOISE)


@given(st.integers(0, 2**32 - 1))
def test_there_are_few_false_alarms(seed: int) -> None:
    _, alarms = level_after(list(noise(seed, 2000)))
    assert len(alarms) <= 1  # of 2,000 values: seldom, soon after the first


def test_a_jump_too_small_to_matter_raises_no_alarm_and_is_followed() -> None:
    level, alarms = level_after([*noise(3, 50, 0.005), *(0.1 + noise(4, 400, 0.005))])
    assert alarms == []
    assert level.mean == pytest.approx(0.1, abs=0.02)


def test_noise_that_is_larger_than_the_first_guess_is_learnt() -> None:
    _, alarms = level_after(list(noise(5, 3000, 6 * NOISE)))
    assert len([alarm for alarm in alarms if alarm > 300]) <= 2


def test_a_value_with_more_noise_of_its_own_counts_less() -> None:
    level, _ = level_after([0.0] * 50)
    assert not any(level.observe(0.5, 5.0 + index, extra_noise=0.5) for index in range(5))


def test_knowledge_grows_uncertain_with_age() -> None:
    level, _ = level_after(list(noise(6, 50)))
    soon, later = level.deviation(5.0), level.deviation(500.0)
    assert soon < NOISE < 0.2 < later
    assert Level(NOISE, 0.01, 0.15).deviation(0.0) == np.inf


def test_a_level_that_was_set_before_any_value_is_as_sure_as_one_value_until_the_first() -> None:
    level = Level(NOISE, drift=0.01, least=0.15)
    level.restart(0.3)
    assert level.deviation(1e6) == pytest.approx(NOISE)
    assert not level.observe(0.3 + NOISE, 1e6)
    assert level.mean == pytest.approx(0.3 + NOISE / 2)
    assert level.deviation(1e6) < NOISE


def test_a_jump_upwards_that_has_to_show_at_three_moments_is_taken_back_by_one_usual_value() -> None:
    level = Level(NOISE, drift=0.01, least=0.15, moments=3, apart_s=0.1)
    assert not any(level.observe(value, 0.1 * index) for index, value in enumerate(noise(7, 50)))
    assert not level.observe(-NOISE, 5.0)
    assert not any(level.observe(2.0, at_s) for at_s in (5.1, 5.11, 5.12, 5.25))
    assert not level.observe(-NOISE, 5.3)
    assert not any(level.observe(2.0, at_s) for at_s in (5.4, 5.5))
    assert level.observe(1.9, 5.6)
    assert level.mean == pytest.approx(1.9)


def test_a_jump_downwards_need_not_last() -> None:
    level = Level(NOISE, drift=0.01, least=0.15, moments=3, apart_s=0.1)
    assert not any(level.observe(value, 0.1 * index) for index, value in enumerate(noise(8, 50)))
    assert [level.observe(-2.0, at_s) for at_s in (5.0, 5.01)] == [False, True]


def test_a_jump_that_came_during_a_value_is_seen_in_whole() -> None:
    """The batch during which a node became five times slower shows a part of it only."""
    level = Level(0.03, 0.01, 0.15, moments=2, apart_s=0.02)
    level.restart(0.0)
    assert not level.observe(math.log(1.6), 0.1)
    assert level.observe(math.log(5.0), 0.2)
    assert math.exp(level.mean) == pytest.approx(5.0)
