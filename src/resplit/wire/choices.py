"""How tokens are chosen and what is told about them, as messages and back."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from resplit import types
from resplit.errors import DataError
from resplit.wire.node_pb2 import LogitChange, Logprobs, Sampling

_MOST_ALLOWED_BYTES = 2**17  # a vocabulary of a million tokens


def sampling_to_wire(sampling: types.Sampling) -> Sampling:
    """How tokens are drawn, as a message."""
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed % 2**62,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
    )


def sampling_from_wire(sampling: Sampling) -> types.Sampling:
    """A message as how tokens are drawn."""
    return types.Sampling(sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k, sampling.min_p)


def changes_to_wire(changes: Sequence[types.LogitChange]) -> list[LogitChange]:
    """Changes of logits as messages. Most tokens are allowed, or most are not, so the bits compress well."""
    return [
        LogitChange(
            allowed=zlib.compress(change.allowed, 1) if change.allowed else b"",
            token_ids=change.added.keys(),
            added=change.added.values(),
        )
        for change in changes
    ]


def changes_from_wire(changes: Sequence[LogitChange]) -> tuple[types.LogitChange, ...]:
    """Messages as changes of logits; DataError if one cannot be read."""
    return tuple(
        types.LogitChange(_inflated(change.allowed), dict(zip(change.token_ids, change.added, strict=False)))
        for change in changes
    )


def logprobs_to_wire(logprobs: Sequence[types.Logprobs]) -> list[Logprobs]:
    """Log probabilities as messages."""
    return [
        Logprobs(chosen=each.chosen, token_ids=[i for i, _ in each.top], logprobs=[value for _, value in each.top])
        for each in logprobs
    ]


def logprobs_from_wire(logprobs: Sequence[Logprobs]) -> tuple[types.Logprobs, ...]:
    """Messages as log probabilities."""
    return tuple(
        types.Logprobs(each.chosen, tuple(zip(each.token_ids, each.logprobs, strict=False))) for each in logprobs
    )


def are_logprobs(logprobs: Sequence[Logprobs], vocabulary: int) -> bool:
    """Whether these are log probabilities of tokens of a model with so many tokens."""
    return all(each < vocabulary for found in logprobs for each in found.token_ids) and not any(
        math.isnan(value) for found in logprobs for value in (found.chosen, *found.logprobs)
    )


def _inflated(data: bytes) -> bytes:
    if not data:
        return b""
    try:
        return zlib.decompressobj().decompress(data, _MOST_ALLOWED_BYTES)
    except zlib.error as error:
        raise DataError(f"a change of logits cannot be read: {error}") from None
