"""Robust non-negative regression: a Huber loss on relative residuals, with coefficients of at least 0.

Pass times and links are both fitted by it: pass times one by one, the thousands of links of a large cluster at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resplit.errors import DataError
from resplit.types import FloatArray

__all__ = ["Fit", "Lines", "huber_lines", "huber_nonnegative"]

KNEE = 0.05  # relative: residuals within 5 % count by their square, larger ones by their absolute value
CAPACITY = 128  # of more rows, a sample is used
LEAST_SCALE = 0.01  # of a row's typical target: the least scale of a row whose prediction is close to 0
GUESS_ROWS = 0.05  # by default a guess weighs as much as this many rows
NO_GUESS_ROWS = 1e-6  # without a guess: only to select among coefficients that the rows cannot distinguish
MOST_ITERATIONS, TOLERANCE = 100, 1e-8  # of the solver; relative to the largest coefficient of the scaled problem


@dataclass(frozen=True, eq=False)
class Fit:
    """Coefficients (F,), their standard errors (F,), and the median relative error over the rows used."""

    coefficients: FloatArray
    errors: FloatArray
    relative_error: float


def huber_nonnegative(
    design: FloatArray,
    target: FloatArray,
    weights: FloatArray | None = None,
    guess: FloatArray | None = None,
    guess_rows: float = GUESS_ROWS,
) -> Fit:
    """Fit `target` (R,) >= 0 by `design` (R, F) @ theta with theta >= 0:

        minimise  sum_r w_r huber((design_r theta - target_r) / scale_r) + kappa |column_scale (theta - guess)|^2

    `weights` are w (R,), all 1 by default. kappa is `guess_rows`: by default so few that `guess` (F,) decides only what
    the rows do not determine.
    The scale of a row is its prediction by a first fit, whose scales are typical targets. (With the targets as scales,
    rows that are too small would outweigh the rest.) Of more than `CAPACITY` rows, `CAPACITY` evenly spaced ones are
    used. If half of the targets or more are 0, so is theta. DataError if there are no rows.
    """
    if len(target) == 0:
        raise DataError("no rows to fit")
    kept = np.unique(np.linspace(0, len(target) - 1, min(len(target), CAPACITY)).astype(int))
    design, target = design[kept], target[kept]
    weights = np.ones(len(kept)) if weights is None else weights[kept]
    typical = _typical(design, target)
    if not typical.any():
        return Fit(np.zeros(design.shape[1]), np.zeros(design.shape[1]), 0.0)
    first = _fit(design, target, typical, weights, guess, guess_rows)
    return _fit(design, target, _row_scale(design @ first.coefficients, typical), weights, guess, guess_rows)


def _typical(design: FloatArray, target: FloatArray) -> FloatArray:
    """The typical target (R,) of a row of this size, where size is the sum of the columns over their means."""
    size = (design / np.maximum(design.mean(axis=0), np.finfo(float).tiny)).sum(axis=1)
    typical: FloatArray = size * np.median(target / size)
    return typical


def _row_scale(predicted: FloatArray, typical: FloatArray) -> FloatArray:
    """The scale (R,) of the residuals: the prediction, and at least `LEAST_SCALE` of the typical target."""
    return np.maximum(predicted, LEAST_SCALE * typical)


def _fit(
    design: FloatArray,
    target: FloatArray,
    row_scale: FloatArray,
    weights: FloatArray,
    guess: FloatArray | None,
    guess_rows: float,
) -> Fit:
    relative, relative_target = design / row_scale[:, None], target / row_scale  # (R, F), (R,)
    column_scale = np.average(relative, axis=0, weights=weights)  # (F,)
    known = column_scale > 0
    column_scale = np.where(known, column_scale, 1.0)
    rows = relative / column_scale  # (R, F)
    stiffness = np.full(len(column_scale), NO_GUESS_ROWS if guess is None else guess_rows)
    scaled_guess = np.zeros(len(column_scale)) if guess is None else guess * column_scale
    scaled = _solve(rows, relative_target, weights, scaled_guess, stiffness)
    residuals = rows @ scaled - relative_target  # (R,)
    errors = _standard_errors(rows, weights, residuals, stiffness)
    # A column that is 0 in all rows keeps its guess.
    coefficients = np.where(known, scaled / column_scale, 0.0 if guess is None else guess)
    return Fit(coefficients, np.where(known, errors / column_scale, 0.0), float(np.median(np.abs(residuals))))


def _solve(
    rows: FloatArray, target: FloatArray, weights: FloatArray, guess: FloatArray, stiffness: FloatArray
) -> FloatArray:
    """The coefficients (F,) of the scaled problem, by iteratively re-weighted least squares.

    A row counts by its square times min(1, `KNEE` / |residual|), with the residual of the iteration before: a bound of
    the Huber loss that touches it there, so each iteration lowers the loss (Huber and Ronchetti, 2009, section 7.8).
    """
    from scipy.optimize import nnls

    tied, tie = np.diag(np.sqrt(stiffness)), np.sqrt(stiffness) * guess
    theta: FloatArray = np.zeros(rows.shape[1])
    share = np.ones(len(target))
    for _ in range(MOST_ITERATIONS):
        root = np.sqrt(weights * share)
        before = theta
        theta = nnls(np.vstack([root[:, None] * rows, tied]), np.concatenate([root * target, tie]))[0]
        if np.abs(theta - before).max() <= TOLERANCE * max(1.0, np.abs(theta).max()):
            break
        share = KNEE / np.maximum(np.abs(rows @ theta - target), KNEE)
    return theta


def _standard_errors(rows: FloatArray, weights: FloatArray, residuals: FloatArray, stiffness: FloatArray) -> FloatArray:
    """Standard error of each coefficient: sigma^2 (A' W A + K)^-1, with sigma from the median absolute deviation."""
    sigma = 1.4826 * np.median(np.abs(residuals - np.median(residuals)))
    information = rows.T @ (weights[:, None] * rows) + np.diag(stiffness)
    errors: FloatArray = sigma * np.sqrt(np.diag(np.linalg.inv(information)))
    return errors


@dataclass(frozen=True, eq=False)
class Lines:
    """Many fits of an intercept and a slope: coefficients (P, 2) and their standard errors (P, 2)."""

    coefficients: FloatArray
    errors: FloatArray


def huber_lines(x: FloatArray, target: FloatArray, weights: FloatArray, guess: FloatArray) -> Lines:
    """`huber_nonnegative` of `target` (P, R) by 1 and `x` (P, R) for each of P problems, all at once.

    `guess` (P, 2) has NaN where there is none.
    """
    kept = np.unique(np.linspace(0, x.shape[1] - 1, min(x.shape[1], CAPACITY)).astype(int))
    x, target, weights = x[:, kept], target[:, kept], weights[:, kept]
    rows = np.stack([np.ones_like(x), x], axis=2)  # (P, R, 2)
    size = (rows / rows.mean(axis=1, keepdims=True)).sum(axis=2)  # (P, R)
    typical = size * np.median(target / size, axis=1, keepdims=True)
    first = _fit_lines(rows, target, typical, weights, guess)
    predicted = np.einsum("prf,pf->pr", rows, first.coefficients)
    return _fit_lines(rows, target, _row_scale(predicted, typical), weights, guess)


def _fit_lines(
    design: FloatArray, target: FloatArray, row_scale: FloatArray, weights: FloatArray, guess: FloatArray
) -> Lines:
    """As `_fit`, for each problem."""
    relative, relative_target = design / row_scale[:, :, None], target / row_scale  # (P, R, 2), (P, R)
    column_scale = np.einsum("prf,pr->pf", relative, weights) / weights.sum(axis=1, keepdims=True)  # (P, 2)
    rows = relative / column_scale[:, None, :]
    stiffness = np.where(np.isnan(guess), NO_GUESS_ROWS, GUESS_ROWS)
    scaled = _solve_lines(rows, relative_target, weights, np.nan_to_num(guess) * column_scale, stiffness)
    residuals = np.einsum("prf,pf->pr", rows, scaled) - relative_target
    sigma = 1.4826 * np.median(np.abs(residuals - np.median(residuals, axis=1, keepdims=True)), axis=1)  # (P,)
    information = np.einsum("prf,pr,prg->pfg", rows, weights, rows) + stiffness[:, :, None] * np.eye(2)
    errors = sigma[:, None] * np.sqrt(np.linalg.inv(information)[:, [0, 1], [0, 1]])
    return Lines(scaled / column_scale, errors / column_scale)


def _solve_lines(
    rows: FloatArray, target: FloatArray, weights: FloatArray, guess: FloatArray, stiffness: FloatArray
) -> FloatArray:
    """As `_solve`, for each problem; one that has converged is left alone."""
    theta, share = np.zeros(guess.shape), np.ones(target.shape)
    at = np.arange(len(theta))  # the problems that have not converged
    for _ in range(MOST_ITERATIONS):
        counted = weights[at] * share[at]
        gram = np.einsum("prf,pr,prg->pfg", rows[at], counted, rows[at]) + stiffness[at][:, :, None] * np.eye(2)
        moment = np.einsum("prf,pr,pr->pf", rows[at], counted, target[at]) + stiffness[at] * guess[at]
        before = theta[at]
        theta[at] = now = _nonnegative(gram, moment)
        moved = np.abs(now - before).max(axis=1) > TOLERANCE * np.maximum(1.0, np.abs(now).max(axis=1))
        at, now = at[moved], now[moved]
        if not len(at):
            break
        residuals = np.einsum("prf,pf->pr", rows[at], now) - target[at]
        share[at] = KNEE / np.maximum(np.abs(residuals), KNEE)
    return theta


def _nonnegative(gram: FloatArray, moment: FloatArray) -> FloatArray:
    """The least of theta' gram theta / 2 - moment' theta over theta >= 0, for each problem (P, 2).

    It is where the gradient vanishes, or else on one of the two axes.
    """
    free = np.linalg.solve(gram, moment[:, :, None])[:, :, 0]
    best = np.maximum(moment / gram[:, [0, 1], [0, 1]], 0.0)  # on each axis
    gain = best * moment / 2  # by which it is better than 0
    on_first = (gain[:, 0] >= gain[:, 1])[:, None]
    on_axis = np.where(np.hstack([on_first, ~on_first]), best, 0.0)
    return np.where((free >= 0).all(axis=1, keepdims=True), free, on_axis)
