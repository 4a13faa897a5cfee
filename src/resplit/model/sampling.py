"""Chooses the next token from logits, and gives log probabilities; the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resplit.errors import DataError
from resplit.model.activation import Activation
from resplit.types import LogitChange, Logprobs, Sampling

Doubles = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Indices = np.ndarray[tuple[int, ...], np.dtype[np.intp]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
# Tokens whose probability is at least this share of the highest one are sorted first, which nearly always decides.
_LIKELY = 1e-3


@dataclass(frozen=True)
class Drawn:
    """The tokens that a pass gives, and the log probabilities that were asked for: of tokens scored, then of these."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()


def to_float32(activation: Activation) -> Floats:
    """The items of a float tensor in float32; bfloat16 is the upper half of a float32."""
    if activation.dtype == "bfloat16":
        upper = np.frombuffer(activation.data, dtype=np.uint16).astype(np.uint32) << 16
        return upper.view(np.float32).reshape(activation.shape)
    return (
        np.frombuffer(activation.data, dtype=activation.dtype).astype(np.float32, copy=False).reshape(activation.shape)
    )


def sample(
    logits: Activation,
    sampling: Sampling,
    first: int,
    changes: Sequence[LogitChange] = (),
    positions: int | None = None,
) -> tuple[int, ...]:
    """Draw the token after each of the last `positions` (None: all) of `logits` (positions, vocabulary).

    The first of these is position `first` of the session. With temperature 0 the most likely token is taken. Otherwise
    the draw depends on seed and position alone, so that a repeated or moved session draws the same tokens. `changes`
    has none or one for each position, and is applied first. DataError if the logits are NaN, if no token has a
    probability, or if a change does not fit the vocabulary.
    """
    rows = to_float32(logits)
    if positions is not None and positions < len(rows):
        rows = rows[-positions:]
    if changes:
        if len(changes) != len(rows):
            raise DataError(f"{len(changes)} changes of logits for {len(rows)} positions")
        rows = np.stack([_changed(values, change) for values, change in zip(rows, changes, strict=True)])
    return tuple(_draw(values, sampling, first + number) for number, values in enumerate(rows))


def logprobs(logits: Activation, token_ids: Sequence[int], most_likely: int) -> tuple[Logprobs, ...]:
    """The log probability of one token at each position of `logits` (positions, vocabulary), by the model itself.

    `most_likely` tokens are given beside it, the likeliest first. DataError for a token outside the vocabulary.
    """
    rows = to_float32(logits).astype(np.float64)
    if len(token_ids) != len(rows) or max(token_ids, default=0) >= rows.shape[1]:
        raise DataError(f"{len(token_ids)} tokens to score do not fit {rows.shape[0]} positions and their vocabulary")
    found = []
    for values, token_id in zip(rows, token_ids, strict=True):
        scale = values.max() + np.log(np.exp(values - values.max()).sum())
        top = tuple((int(i), float(values[i] - scale)) for i in _largest(values, most_likely))
        found.append(Logprobs(float(values[token_id] - scale), top))
    return tuple(found)


def _largest(values: Doubles, count: int) -> Indices:
    """The places of the largest values, the largest first, ties in order. To sort all takes ten times as long."""
    count = min(count, len(values))
    if not count:
        return np.empty(0, np.intp)
    likely = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return likely[np.argsort(-values[likely], kind="stable")[:count]]


def _changed(values: Floats, change: LogitChange) -> Floats:
    """The logits of one position (vocabulary) with a change applied."""
    vocabulary = len(values)
    if len(change.allowed) > (vocabulary + 7) // 8 or max(change.added, default=0) >= vocabulary:
        raise DataError(f"a change of logits does not fit the vocabulary of {vocabulary} tokens")
    changed = values.copy()
    changed[list(change.added)] += np.fromiter(change.added.values(), np.float32, len(change.added))
    if change.allowed:
        bits = np.frombuffer(change.allowed, dtype=np.uint8)
        changed[np.unpackbits(bits, count=vocabulary, bitorder="little") == 0] = -np.inf
    return changed


def _draw(values: Floats, sampling: Sampling, position: int) -> int:
    """Draw the token after `position` from its logits (vocabulary)."""
    likeliest = int(values.argmax())  # the first NaN if there is one
    best = values[likeliest]
    if np.isnan(best):
        raise DataError("the logits are NaN, as were the hidden states that this node received")
    if np.isneginf(best):
        raise DataError("no token is allowed")
    if sampling.temperature <= 0:
        return likeliest
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (values - best).astype(np.float64) / sampling.temperature
    if np.isnan(scaled).any() or not sampling.top_p > 0:
        raise DataError(f"no token can be drawn with temperature {sampling.temperature} and top_p {sampling.top_p}")
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    generator = np.random.Generator(np.random.Philox(key=[sampling.seed % 2**64, position]))
    share = generator.random()
    drawn = _drawn(probabilities, np.flatnonzero(probabilities >= _LIKELY * probabilities.max()), sampling, share)
    if drawn is None:
        drawn = _drawn(probabilities, np.arange(len(probabilities)), sampling, share)
    assert drawn is not None  # all tokens always decide it
    return drawn


def _drawn(probabilities: Doubles, likely: Indices, sampling: Sampling, share: float) -> int | None:
    """The token at this `share` of what is kept; None if the `likely` tokens, all up to a bound, do not decide it.

    Tokens are in order of their probability, ties in order of their ids. To sort the whole vocabulary takes longer than
    all else.
    """
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    cumulative = probabilities[order].cumsum()
    kept = _kept(probabilities[order], cumulative, sampling)
    if kept < len(order) or len(order) == len(probabilities):
        kept = min(kept, len(order))
        return int(order[min(int(np.searchsorted(cumulative[:kept], share * cumulative[kept - 1], "right")), kept - 1)])
    if sampling.top_p < 1 or sampling.top_k or sampling.min_p > 0 or share >= cumulative[-1]:
        return None
    return int(order[np.searchsorted(cumulative, share, "right")])  # all are kept, and their sum is 1


def _kept(ordered: Doubles, cumulative: Doubles, sampling: Sampling) -> int:
    """From how many tokens, the likeliest first, one is drawn."""
    kept = int(np.searchsorted(cumulative, sampling.top_p)) + 1
    if sampling.top_k:
        kept = min(kept, sampling.top_k)
    if sampling.min_p > 0:
        kept = min(kept, int(np.searchsorted(-ordered, -sampling.min_p * ordered[0], side="right")))
    return max(1, kept)
