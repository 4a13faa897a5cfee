"""Quantised weights stay close to the original, and the packed bytes stand for exactly the dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.model.engines.onnx.quantize import BLOCK_SIZE, quantise
from tests.support.properties import examples


def weights(seed: int, columns: int, rows: int, scale: float = 0.02) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((columns, rows))).astype(np.float32)


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.008), (4, 0.1)])
def test_the_relative_error_is_that_of_the_width(bits: int, limit: float) -> None:
    original = weights(1, 64, 256)
    error = quantise(original, bits).dequantised() - original
    assert np.sqrt((error**2).sum() / (original**2).sum()) < limit


@examples(50)
@given(
    seed=st.integers(0, 2**32),
    columns=st.integers(1, 9),
    rows=st.integers(1, 100),
    bits=st.sampled_from([4, 8]),
    scale=st.sampled_from([1e-6, 0.02, 1e4]),
)
def test_every_weight_is_within_a_step_of_its_block_or_clipped_to_it(
    seed: int, columns: int, rows: int, bits: int, scale: float
) -> None:
    original = weights(seed, columns, rows, scale)
    matrix = quantise(original, bits)
    blocks = -(-rows // BLOCK_SIZE)
    assert matrix.packed.shape == (columns, blocks, BLOCK_SIZE * bits // 8)
    assert matrix.scales.shape == (columns, blocks)
    assert matrix.zero_points.shape == (columns, -(-blocks * bits // 8))
    steps = np.repeat(matrix.scales, BLOCK_SIZE, axis=1)[:, :rows]
    error = np.abs(matrix.dequantised() - original)
    assert (error <= 0.25 * 2**bits * steps + 1e-12).all()
    assert np.abs(matrix.dequantised()).max() <= 1.1 * np.abs(original).max()


def test_zero_stays_zero_and_a_grid_of_sixteen_levels_is_exact() -> None:
    assert (quantise(np.zeros((2, 40), dtype=np.float32), 4).dequantised() == 0).all()
    levels = ((np.arange(64) % 16 - 5) * 0.5).astype(np.float32).reshape(1, 64)
    assert np.allclose(quantise(levels, 4).dequantised(), levels, atol=1e-6)


def test_four_bits_use_half_the_bytes_of_eight() -> None:
    original = weights(2, 4, 64)
    assert 2 * quantise(original, 4).packed.nbytes == quantise(original, 8).packed.nbytes


def correlated(seed: int, rows: int, samples: int) -> np.ndarray:
    """Inputs (samples, rows) that mostly move together, and have a mean."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((samples, 3)) @ rng.standard_normal((3, rows))
    return (common + 0.3 * rng.standard_normal((samples, rows)) + 0.5).astype(np.float32)


@pytest.mark.parametrize("rows", [96, 100])
def test_weights_that_are_fitted_to_inputs_give_products_with_less_error(rows: int) -> None:
    original, every = weights(3, 48, rows), correlated(4, rows, 1200)
    inputs, others = every[:800], every[800:]
    moments = inputs.T @ inputs / len(inputs)

    def error(moments: np.ndarray | None) -> float:
        return float(np.square(others @ (quantise(original, 4, moments).dequantised() - original).T).sum())

    assert error(moments) < 0.5 * error(None)


def test_inputs_that_are_always_zero_leave_the_weights_near_to_the_original() -> None:
    original = weights(5, 16, 64)
    error = quantise(original, 4, np.zeros((64, 64), dtype=np.float32)).dequantised() - original
    assert np.sqrt((error**2).sum() / (original**2).sum()) < 0.1


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_moments_that_overflowed_do_not_count(value: float) -> None:
    original = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)
    moments = np.full((64, 64), value, dtype=np.float32)
    assert (quantise(original, 4, moments).dequantised() == quantise(original, 4).dequantised()).all()
