"""Robust non-negative regression, stated once in cvxpy and solved again with new parameters.

Knows numbers only: it is the fit of block times and of links alike.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from resplit.errors import DataError
from resplit.types import FloatArray

__all__ = ["Fit", "huber_nonnegative"]

KNEE = 0.05  # relative: a row within 5 % counts by its square, one farther off by its distance
CAPACITY = 128  # rows of the problem; fewer are padded with weight 0, more are thinned
LEAST_YARD = 0.01  # of what is usual, where a prediction is next to nothing
GUESS_ROWS = 0.05  # a guess from elsewhere weighs as much as this many rows
NO_GUESS_ROWS = 1e-6  # only to choose among coefficients that the rows cannot tell apart
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Fit:
    """Coefficients (F,), their standard errors (F,), and the median relative error over the rows used."""

    coefficients: FloatArray
    errors: FloatArray
    relative_error: float


def huber_nonnegative(
    design: FloatArray, target: FloatArray, weights: FloatArray | None = None, guess: FloatArray | None = None
) -> Fit:
    """Fit `target` (R,) > 0 by `design` (R, F) @ theta with theta >= 0, robustly and in relative terms:

        minimise  sum_r w_r huber((design_r theta - target_r) / yard_r) + kappa |scale (theta - guess)|^2

    where `scale` makes the columns alike and kappa is small: the guess decides what the rows leave open. A residual's
    yard is what is predicted of the row, from a first fit by a rough yard. (By the target itself, rows that are too
    small would outweigh the rest.) Where rows are more than `CAPACITY`, as many are used, evenly spread. DataError if
    there is none or the solver gives up.
    """
    if len(target) == 0:
        raise DataError("no rows to fit")
    kept = np.unique(np.linspace(0, len(target) - 1, min(len(target), CAPACITY)).astype(int))
    design, target = design[kept], target[kept]
    weights = np.ones(len(kept)) if weights is None else weights[kept]
    rough = _usual(design, target)
    first = _fit(design, target, rough, weights, guess)
    return _fit(design, target, np.maximum(design @ first.coefficients, LEAST_YARD * rough), weights, guess)


def _usual(design: FloatArray, target: FloatArray) -> FloatArray:
    """What is usual (R,) for a row of its size, all columns counting alike."""
    size = (design / np.maximum(design.mean(axis=0), np.finfo(float).tiny)).sum(axis=1)
    usual: FloatArray = size * np.median(target / size)
    return usual


def _fit(
    design: FloatArray, target: FloatArray, yard: FloatArray, weights: FloatArray, guess: FloatArray | None
) -> Fit:
    relative, aim = design / yard[:, None], target / yard  # (R, F), (R,)
    scale = np.average(relative, axis=0, weights=weights)  # (F,)
    known = scale > 0
    scale = np.where(known, scale, 1.0)
    stiffness = np.full(len(scale), NO_GUESS_ROWS if guess is None else GUESS_ROWS)
    scaled_guess = np.zeros(len(scale)) if guess is None else guess * scale
    scaled = _solve(relative / scale, aim, weights, scaled_guess, stiffness)
    residuals = relative / scale @ scaled - aim  # (R,)
    errors = _standard_errors(relative / scale, weights, residuals, stiffness)
    # A column that no row touches keeps what was guessed of it.
    coefficients = np.where(known, scaled / scale, 0.0 if guess is None else guess)
    return Fit(coefficients, np.where(known, errors / scale, 0.0), float(np.median(np.abs(residuals))))


def _solve(
    rows: FloatArray, target: FloatArray, weights: FloatArray, guess: FloatArray, stiffness: FloatArray
) -> FloatArray:
    """theta (F,) of the scaled problem."""
    count, width = rows.shape
    with _lock:
        import cvxpy as cp

        problem, parameters, theta = _regression(width)
        padding = CAPACITY - count
        parameters["rows"].value = np.vstack([rows, np.zeros((padding, width))])
        parameters["target"].value = np.concatenate([target, np.zeros(padding)])
        parameters["weights"].value = np.concatenate([weights, np.zeros(padding)])
        parameters["guess"].value = guess
        parameters["stiffness"].value = stiffness
        # A solver kept between calls scales by its first data: the answer would depend on what was fitted before.
        problem.solve(solver=cp.CLARABEL, warm_start=False)
        if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            raise DataError(f"the robust fit of {count} rows ended as {problem.status}")
        solution: FloatArray = np.maximum(theta.value, 0.0)
        return solution


@cache
def _regression(width: int) -> tuple[Any, dict[str, Any], Any]:
    """The problem, its parameters and its variable (Any: cvxpy has no types). Residual and deviation are variables, so
    that parameters are multiplied by no other parameter (DPP)."""
    import cvxpy as cp

    parameters = {
        "rows": cp.Parameter((CAPACITY, width)),
        "target": cp.Parameter(CAPACITY),
        "weights": cp.Parameter(CAPACITY, nonneg=True),
        "guess": cp.Parameter(width),
        "stiffness": cp.Parameter(width, nonneg=True),
    }
    theta = cp.Variable(width, nonneg=True)
    residual, deviation = cp.Variable(CAPACITY), cp.Variable(width)
    loss = parameters["weights"] @ cp.huber(residual, KNEE) + parameters["stiffness"] @ cp.square(deviation)
    constraints = [
        residual == parameters["rows"] @ theta - parameters["target"],
        deviation == theta - parameters["guess"],
    ]
    return cp.Problem(cp.Minimize(loss), constraints), parameters, theta


def _standard_errors(rows: FloatArray, weights: FloatArray, residuals: FloatArray, stiffness: FloatArray) -> FloatArray:
    """Of each coefficient, from the spread of the residuals: sigma^2 (A' W A + K)^-1, sigma by the median deviation."""
    sigma = 1.4826 * np.median(np.abs(residuals - np.median(residuals)))
    information = rows.T @ (weights[:, None] * rows) + np.diag(stiffness)
    errors: FloatArray = sigma * np.sqrt(np.diag(np.linalg.inv(information)))
    return errors
