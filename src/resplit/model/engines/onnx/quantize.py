"""Weight-only quantisation of matrices, in the layout of ONNX Runtime's MatMulNBits.

Each output column is cut into blocks of `BLOCK_SIZE` weights. A block has one float32 scale and one integer zero point:
weight = scale * (q - zero point).

With 4 bits, the error of a weight can be made up for by the weights of its column that are not rounded yet. What makes
up for what depends on the inputs that come together: `moments` is the mean of x times its transpose over inputs x. This
is GPTQ (Frantar et al., 2023), with a search for the scale and the zero point of each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import lapack

# With blocks of 64 or 128, the runtime adds up a single row in another order than the rows of a batch.
BLOCK_SIZE = 32
# The ranges that are tried for a block of 4 bits, in shares of its own. Larger ones move the zero point, too.
_SPANS = (1.0, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# The same, and the zero points beside the nearest one, where moments are known.
_SHARES = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.7)
_SHIFTS = (0, -1, 1)
# Added to the moments of each input, as a share of their mean: inputs of other texts differ from the sample's.
_DAMPING = 0.01
FloatMatrix = np.ndarray[Any, np.dtype[np.float32]]
ByteArray = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix of `columns` outputs and `rows` inputs, packed in `bits` (4 or 8) per weight.

    `packed` is (columns, blocks, BLOCK_SIZE * bits / 8), `scales` (columns, blocks), and `zero_points` (columns,
    blocks * bits / 8 rounded up).
    """

    bits: int
    rows: int
    columns: int
    packed: ByteArray
    scales: FloatMatrix
    zero_points: ByteArray

    def dequantised(self) -> FloatMatrix:
        """The weights that the packed integers stand for, (columns, rows)."""
        blocks = self.scales.shape[1]
        q = _unpacked(self.packed.reshape(self.columns, -1), self.bits)
        zero = _unpacked(self.zero_points, self.bits)[:, :blocks]
        steps = q.reshape(self.columns, blocks, BLOCK_SIZE).astype(np.float32) - zero[:, :, None].astype(np.float32)
        weights: FloatMatrix = (steps * self.scales[:, :, None]).reshape(self.columns, -1)[:, : self.rows]
        return weights


def quantise(weight: FloatMatrix, bits: int, moments: FloatMatrix | None = None) -> QuantisedMatrix:
    """Quantise a weight matrix (columns, rows), as Hugging Face stores linear layers; `bits` is 4 or 8.

    With 4 bits and finite `moments` (rows, rows) of its inputs, the error of the products is made small; else that of
    the weights.
    """
    columns, rows = weight.shape
    blocks = -(-rows // BLOCK_SIZE)
    padded = np.zeros((columns, blocks * BLOCK_SIZE), dtype=np.float32)
    padded[:, :rows] = weight
    # A model that overflows on the sample text keeps its weights as near as they can be alone.
    if bits == 4 and moments is not None and np.isfinite(moments).all():
        q, scale, zero = _made_up_for(padded, moments)
    else:
        q, scale, zero = _least_error(padded.reshape(columns, blocks, BLOCK_SIZE), bits)
    packed = _packed(q.reshape(columns, -1).astype(np.uint8), bits).reshape(columns, blocks, -1)
    return QuantisedMatrix(bits, rows, columns, packed, scale, _packed(zero.astype(np.uint8), bits))


def _made_up_for(weight: FloatMatrix, moments: FloatMatrix) -> tuple[FloatMatrix, FloatMatrix, FloatMatrix]:
    """Integers of 4 bits (columns, rows), scales and zero points (columns, blocks), by GPTQ."""
    columns, rows = weight.shape
    factor = _factor(moments, rows)
    costs = np.diag(factor) ** np.float32(-2)  # of an error in each row, once later rows have made up for it
    rest = np.ascontiguousarray(weight.T)  # (rows, columns): what is still to be rounded
    q = np.empty((rows, columns), dtype=np.float32)
    scales, zeros = (np.empty((columns, rows // BLOCK_SIZE), dtype=np.float32) for _ in range(2))
    for block, first in enumerate(range(0, rows, BLOCK_SIZE)):
        end = first + BLOCK_SIZE
        scale, zero = _grid(rest[first:end], costs[first:end, None])
        errors = np.empty((BLOCK_SIZE, columns), dtype=np.float32)
        for row in range(first, end):
            q[row] = np.clip(np.rint(rest[row] / scale) + zero, 0, 15)
            error = (rest[row] - (q[row] - zero) * scale) / factor[row, row]
            rest[row + 1 : end] -= factor[row, row + 1 : end, None] * error
            errors[row - first] = error
        rest[end:] -= factor[first:end, end:].T @ errors
        scales[:, block], zeros[:, block] = scale, zero
    return np.ascontiguousarray(q.T), scales, zeros


def _factor(moments: FloatMatrix, rows: int) -> FloatMatrix:
    """The upper triangle U for which U.T U is the inverse of the damped moments; the last rows may be padding."""
    damped = np.zeros((rows, rows))
    damped[: len(moments), : len(moments)] = moments
    mean = float(np.diag(moments).mean())
    damped[np.diag_indices(rows)] += _DAMPING * mean if mean > 0 else 1.0
    reversed_lower = lapack.dpotrf(damped[::-1, ::-1], lower=1)[0]
    factor: FloatMatrix = lapack.dtrtri(reversed_lower, lower=1)[0][::-1, ::-1].astype(np.float32)
    return factor


def _grid(weights: FloatMatrix, costs: FloatMatrix) -> tuple[FloatMatrix, FloatMatrix]:
    """Scale and zero point (columns) with the least error of these weights (BLOCK_SIZE, columns), at these costs."""
    low, high = np.minimum(weights.min(axis=0), 0.0), np.maximum(weights.max(axis=0), 0.0)
    least = np.full(weights.shape[1], np.inf, dtype=np.float32)
    best_scale, best_zero = np.ones_like(least), np.zeros_like(least)
    for share in _SHARES:
        tried = np.where(high > low, (high - low) * np.float32(share / 15), np.float32(1))
        for shift in _SHIFTS:
            zero = np.clip(np.rint(-low * np.float32(share) / tried) + shift, 0, 15)
            steps = np.clip(np.rint(weights / tried), -zero, 15 - zero)
            weighted = costs * steps
            squares, products = (weighted * steps).sum(axis=0), (weighted * weights).sum(axis=0)
            scale = np.where(products > 0, products / np.maximum(squares, 1e-30), tried)
            error = (costs * np.square(weights - steps * scale)).sum(axis=0)
            better = error < least
            least = np.minimum(least, error)
            best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
    return best_scale, best_zero


def _least_error(grouped: FloatMatrix, bits: int) -> tuple[FloatMatrix, FloatMatrix, FloatMatrix]:
    """Integers (columns, blocks, BLOCK_SIZE), scales and zero points (columns, blocks) that are near to the weights.

    Of several ranges for each block, the one with the least squared error is taken.
    """
    q, scale, zero = _nearest(grouped, bits, _SPANS[0])
    error = _squared_error(grouped, q, scale, zero)
    for span in _SPANS[1:] if bits < 8 else ():
        other = _nearest(grouped, bits, span)
        other_error = _squared_error(grouped, *other)
        better = other_error < error
        q[better], scale[better], zero[better] = (each[better] for each in other)
        error = np.minimum(error, other_error)
    return q, scale, zero


def _nearest(grouped: FloatMatrix, bits: int, span: float) -> tuple[FloatMatrix, FloatMatrix, FloatMatrix]:
    """Integers (columns, blocks, BLOCK_SIZE), scales and zero points (columns, blocks).

    The grid contains 0, and spans the share `span` of the block's range; weights outside it are clipped. Then the
    scale is the best one for these integers.
    """
    steps = 2**bits - 1
    low = np.minimum(grouped.min(axis=2), 0.0) * span
    high = np.maximum(grouped.max(axis=2), 0.0) * span
    scale = np.where(high > low, (high - low) / steps, 1.0).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, steps).astype(np.float32)
    q = np.clip(np.rint(grouped / scale[:, :, None]) + zero[:, :, None], 0, steps)
    return q, _fitted_scale(grouped, q - zero[:, :, None], scale), zero


def _fitted_scale(grouped: FloatMatrix, steps: FloatMatrix, scale: FloatMatrix) -> FloatMatrix:
    """The scale with the least squared error for these steps from zero; `scale` where all steps are 0."""
    squares = np.einsum("cbi,cbi->cb", steps, steps)
    products = np.einsum("cbi,cbi->cb", steps, grouped)
    fitted: FloatMatrix = np.where(squares > 0, products / np.maximum(squares, 1.0), scale).astype(np.float32)
    return fitted


def _squared_error(grouped: FloatMatrix, q: FloatMatrix, scale: FloatMatrix, zero: FloatMatrix) -> FloatMatrix:
    difference = (q - zero[:, :, None]) * scale[:, :, None] - grouped
    error: FloatMatrix = np.einsum("cbi,cbi->cb", difference, difference)
    return error


def _packed(values: ByteArray, bits: int) -> ByteArray:
    """Rows of small integers as bytes; with 4 bits the even items are the low halves."""
    if bits == 8:
        return values
    even = np.zeros((values.shape[0], -(-values.shape[1] // 2) * 2), dtype=np.uint8)
    even[:, : values.shape[1]] = values
    packed: ByteArray = even[:, 0::2] | (even[:, 1::2] << 4)
    return packed


def _unpacked(packed: ByteArray, bits: int) -> ByteArray:
    if bits == 8:
        return packed
    values: ByteArray = np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(packed.shape[0], -1)
    return values
