"""Draws the next token from logits; the same for every engine."""

from __future__ import annotations

import numpy as np

from resplit.errors import DataError
from resplit.model.activation import Activation
from resplit.types import Sampling


def to_float32(activation: Activation) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The items of a float tensor in float32; bfloat16 is the upper half of a float32."""
    if activation.dtype == "bfloat16":
        upper = np.frombuffer(activation.data, dtype=np.uint16).astype(np.uint32) << 16
        return upper.view(np.float32).reshape(activation.shape)
    return np.frombuffer(activation.data, dtype=activation.dtype).astype(np.float32).reshape(activation.shape)


def sample(logits: Activation, sampling: Sampling, first: int) -> tuple[int, ...]:
    """Draw the token after each position from `logits` (positions, vocabulary), computed from position `first` on.

    With temperature 0 the most likely token is taken. Otherwise the draw depends on seed and position alone, so that a
    repeated or moved session draws the same tokens. DataError if the logits are NaN or no token has a probability.
    """
    return tuple(_draw(values, sampling, first + number) for number, values in enumerate(to_float32(logits)))


def _draw(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], sampling: Sampling, position: int) -> int:
    """Draw the token after `position` from its logits (vocabulary)."""
    if np.isnan(values).any():
        raise DataError("the logits are NaN, as were the hidden states that this node received")
    if sampling.temperature <= 0:
        return int(values.argmax())
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (values - values.max()).astype(np.float64) / sampling.temperature
    if np.isnan(scaled).any() or not sampling.top_p > 0:
        raise DataError(f"no token can be drawn with temperature {sampling.temperature} and top_p {sampling.top_p}")
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order]
    cumulative = ordered.cumsum()
    kept = cumulative[: int(np.searchsorted(cumulative, sampling.top_p)) + 1]
    generator = np.random.Generator(np.random.Philox(key=[sampling.seed % 2**64, position]))
    drawn = np.searchsorted(kept, generator.random() * kept[-1], side="right")
    return int(order[min(int(drawn), len(kept) - 1)])
