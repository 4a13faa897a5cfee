"""The robust non-negative regression."""

from __future__ import annotations

import numpy as np
import pytest

from resplit.cost.robust import CAPACITY, KNEE, _fit, huber_nonnegative
from resplit.errors import DataError
from resplit.types import FloatArray


def _rows(seed: int, count: int, truth: list[float], noise: float = 0.02) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    design = np.column_stack([np.ones(count), *rng.uniform(0, 10, (len(truth) - 1, count))])
    return design, design @ truth * np.exp(noise * rng.standard_normal(count))


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_of_rows_thrice_too_slow_hardly_moves_the_coefficients(seed: int) -> None:
    truth = [2.0, 0.5, 0.1]
    design, target = _rows(seed, 200, truth)
    target[np.random.default_rng(seed).choice(200, 40, replace=False)] *= 3
    fit = huber_nonnegative(design, target)
    np.testing.assert_allclose(fit.coefficients, truth, rtol=0.15)
    np.testing.assert_allclose(design @ fit.coefficients, design @ truth, rtol=0.05)


def test_a_clock_that_says_next_to_nothing_has_no_great_weight() -> None:
    design, target = _rows(0, 200, [2.0, 0.5, 0.1])
    target[::20] = 1e-6
    np.testing.assert_allclose(huber_nonnegative(design, target).coefficients, [2.0, 0.5, 0.1], rtol=0.15)


def test_coefficients_are_never_negative_even_where_the_data_fall() -> None:
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

    best = _fit(design, target, target, np.ones(60), None).coefficients
    rng = np.random.default_rng(seed)
    for _ in range(200):
        other = np.maximum(best * (1 + 0.05 * rng.standard_normal(3)) + 0.01 * rng.standard_normal(3), 0)
        assert loss(best) <= loss(other) + 1e-5


def test_a_guess_decides_what_the_rows_leave_open_and_nothing_else() -> None:
    design = np.column_stack([np.ones(30), np.full(30, 4.0)])  # the columns cannot be told apart
    fit = huber_nonnegative(design, np.full(30, 9.0), guess=np.array([1.0, 1.0]))
    assert design[0] @ fit.coefficients == pytest.approx(9.0, rel=0.01)
    assert 4 * fit.coefficients[1] - fit.coefficients[0] == pytest.approx(4 * 1.0 - 1.0, rel=0.01)
    with_own_rows = huber_nonnegative(*_rows(0, 100, [2.0, 0.5]), guess=np.array([20.0, 5.0]))
    np.testing.assert_allclose(with_own_rows.coefficients, [2.0, 0.5], rtol=0.1)


def test_more_rows_than_the_problem_holds_are_thinned_and_give_the_same() -> None:
    design, target = _rows(1, 20 * CAPACITY, [2.0, 0.5])
    np.testing.assert_allclose(huber_nonnegative(design, target).coefficients, [2.0, 0.5], rtol=0.05)


def test_standard_errors_cover_the_truth_and_shrink_with_rows() -> None:
    truth = np.array([2.0, 0.5])
    few, many = (huber_nonnegative(*_rows(3, count, truth.tolist(), 0.05)) for count in (15, 240))
    assert (many.errors < few.errors).all()
    assert (np.abs(many.coefficients - truth) < 4 * many.errors).all()


def test_no_rows_are_a_data_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        huber_nonnegative(np.zeros((0, 3)), np.zeros(0))
