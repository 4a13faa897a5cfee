"""The robust non-negative regression."""

from __future__ import annotations

import numpy as np
import pytest

from resplit.cost.robust import (
    CAPACITY,
    GUESS_ROWS,
    KNEE,
    LEAST_SCALE,
    _fit,
    _row_scale,
    _typical,
    huber_lines,
    huber_nonnegative,
)
from resplit.errors import DataError
from resplit.types import FloatArray


def _rows(seed: int, count: int, truth: list[float], noise: float = 0.02) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    design = np.column_stack([np.ones(count), *rng.uniform(0, 10, (len(truth) - 1, count))])
    return design, design @ truth * np.exp(noise * rng.standard_normal(count))


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_of_the_rows_at_three_times_the_time_hardly_changes_the_coefficients(seed: int) -> None:
    truth = [2.0, 0.5, 0.1]
    design, target = _rows(seed, 200, truth)
    target[np.random.default_rng(seed).choice(200, 40, replace=False)] *= 3
    fit = huber_nonnegative(design, target)
    np.testing.assert_allclose(fit.coefficients, truth, rtol=0.15)
    np.testing.assert_allclose(design @ fit.coefficients, design @ truth, rtol=0.05)


def test_targets_close_to_zero_have_little_weight() -> None:
    design, target = _rows(0, 200, [2.0, 0.5, 0.1])
    target[::20] = 1e-6
    np.testing.assert_allclose(huber_nonnegative(design, target).coefficients, [2.0, 0.5, 0.1], rtol=0.15)


def test_coefficients_are_never_negative_even_if_the_data_decrease() -> None:
    design = np.column_stack([np.ones(50), np.arange(50.0)])
    fit = huber_nonnegative(design, 10.0 - 0.1 * np.arange(50.0))
    assert (fit.coefficients >= 0).all()
    assert fit.coefficients[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_non_negative_coefficients_have_a_smaller_loss(seed: int) -> None:
    design, target = _rows(seed, 60, [1.0, 0.0, 0.3], noise=0.1)

    def loss(coefficients: FloatArray) -> float:
        residual = np.abs(design @ coefficients / target - 1)
        return float(np.where(residual <= KNEE, residual**2, 2 * KNEE * residual - KNEE**2).sum())

    best = _fit(design, target, target, np.ones(60), None, GUESS_ROWS).coefficients
    rng = np.random.default_rng(seed)
    for _ in range(200):
        other = np.maximum(best * (1 + 0.05 * rng.standard_normal(3)) + 0.01 * rng.standard_normal(3), 0)
        assert loss(best) <= loss(other) + 1e-5


def test_a_guess_decides_only_coefficients_that_the_rows_do_not_determine() -> None:
    design = np.column_stack([np.ones(30), np.full(30, 4.0)])  # the columns are proportional
    fit = huber_nonnegative(design, np.full(30, 9.0), guess=np.array([1.0, 1.0]))
    assert design[0] @ fit.coefficients == pytest.approx(9.0, rel=0.01)
    assert 4 * fit.coefficients[1] - fit.coefficients[0] == pytest.approx(4 * 1.0 - 1.0, rel=0.01)
    with_own_rows = huber_nonnegative(*_rows(0, 100, [2.0, 0.5]), guess=np.array([20.0, 5.0]))
    np.testing.assert_allclose(with_own_rows.coefficients, [2.0, 0.5], rtol=0.1)


def test_a_sample_of_too_many_rows_gives_the_same_coefficients() -> None:
    design, target = _rows(1, 20 * CAPACITY, [2.0, 0.5])
    np.testing.assert_allclose(huber_nonnegative(design, target).coefficients, [2.0, 0.5], rtol=0.05)


def test_the_scale_of_a_row_is_its_prediction_but_never_close_to_zero() -> None:
    predicted, typical = np.array([10.0, 0.0, 3.0 * LEAST_SCALE]), np.array([5.0, 5.0, 2.0])
    np.testing.assert_allclose(_row_scale(predicted, typical), [10.0, 5.0 * LEAST_SCALE, 3.0 * LEAST_SCALE])


def test_a_typical_target_grows_with_the_size_of_its_row_in_all_columns() -> None:
    design = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    np.testing.assert_allclose(_typical(design, np.array([5.0, 10.0, 15.0])), [5.0, 10.0, 15.0])
    np.testing.assert_allclose(_typical(design, np.array([5.0, 10.0, 1e6])), [5.0, 10.0, 15.0])


def test_residuals_are_relative_to_the_prediction() -> None:
    rng = np.random.default_rng(0)
    design = np.column_stack([np.ones(120), rng.uniform(0, 100, 120)])  # the second column does not matter
    target = 2.0 * np.where(np.arange(120) % 2, 1.04, 0.96)
    fit = huber_nonnegative(design, target)
    assert fit.coefficients[0] == pytest.approx(2.0, rel=0.02)
    assert fit.relative_error == pytest.approx(0.04, rel=0.1)


def test_rows_with_weight_zero_do_not_count() -> None:
    design, target = _rows(0, 60, [2.0, 0.5])
    spoilt = np.where(np.arange(60) < 30, target, 9 * target)
    fit = huber_nonnegative(design, spoilt, weights=np.where(np.arange(60) < 30, 1.0, 0.0))
    np.testing.assert_allclose(fit.coefficients, [2.0, 0.5], rtol=0.1)


def test_a_column_that_is_zero_in_all_rows_keeps_its_guess() -> None:
    design, target = _rows(0, 40, [2.0, 0.5])
    wider = np.column_stack([design, np.zeros(40)])
    assert huber_nonnegative(wider, target, guess=np.array([2.0, 0.5, 7.0])).coefficients[2] == 7.0
    fit = huber_nonnegative(wider, target)
    assert (fit.coefficients[2], fit.errors[2]) == (0.0, 0.0)


def test_standard_errors_cover_the_truth_and_shrink_with_rows() -> None:
    truth = np.array([2.0, 0.5])
    few, many = (huber_nonnegative(*_rows(3, count, truth.tolist(), 0.05)) for count in (15, 240))
    assert (many.errors < few.errors).all()
    assert (np.abs(many.coefficients - truth) < 4 * many.errors).all()


def test_no_rows_are_a_data_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        huber_nonnegative(np.zeros((0, 3)), np.zeros(0))


@pytest.mark.parametrize("late_s", [[], [0.5]])
def test_what_takes_no_time_is_fitted_to_none(late_s: list[float]) -> None:
    target = np.array([0.0, 0.0, *late_s])
    design = np.column_stack([np.ones(len(target)), np.arange(len(target)) + 1.0])
    fit = huber_nonnegative(design, target, guess=np.array([0.1, 0.2]))
    assert [*fit.coefficients, *fit.errors, fit.relative_error] == [0.0] * 5


def test_a_guess_weighs_as_much_as_a_twentieth_of_a_row() -> None:
    design, target = np.ones((1, 1)), np.array([2.0])  # relative to its prediction, the only row has the target 1
    guided = _fit(design, target, target, np.ones(1), np.array([2.02]), GUESS_ROWS)
    assert guided.coefficients[0] == pytest.approx(2.0 + 0.02 * 0.05 / 1.05, rel=1e-5)
    assert _fit(design, target, target, np.ones(1), None, GUESS_ROWS).coefficients[0] == pytest.approx(2.0, rel=1e-5)


def test_the_scale_of_a_column_is_its_mean_over_the_rows_that_have_weight() -> None:
    design, target = np.array([[1.0], [1.0], [1e6]]), np.array([2.0, 2.0, 1.0])
    fit = _fit(design, target, np.full(3, 2.0), np.array([1.0, 1.0, 0.0]), np.array([2.02]), GUESS_ROWS)
    assert fit.coefficients[0] == pytest.approx(2.0 + 0.02 * 0.05 / 2.05, rel=1e-4)


@pytest.mark.parametrize("count", [2, 7, CAPACITY + 30])
def test_many_lines_at_once_are_those_that_are_fitted_one_by_one(count: int) -> None:
    rng = np.random.default_rng(count)
    x = rng.choice([256.0, 4096.0, 65536.0], (40, count))
    x[:, :2] = 256.0, 65536.0
    seconds = (0.003 + x / 2e7) * np.exp(0.2 * rng.standard_normal(x.shape))
    seconds[:5] = 0.01 - x[:5] / 1e7  # slopes that would be negative
    seconds[5:9, 0] += 0.5  # and messages that hung
    weights = rng.choice([0.5, 1.0], x.shape)
    guess = np.tile([0.004, 4e-8], (40, 1))
    guess[::2] = np.nan
    lines = huber_lines(x, seconds, weights, guess)
    assert (lines.coefficients >= 0).all()
    assert (lines.coefficients == 0).any()
    for place in range(40):
        known = None if np.isnan(guess[place, 0]) else guess[place]
        design = np.column_stack([np.ones(count), x[place]])
        one = huber_nonnegative(design, seconds[place], weights[place], known)
        np.testing.assert_allclose(lines.coefficients[place], one.coefficients, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(lines.errors[place], one.errors, rtol=1e-4, atol=1e-9)
