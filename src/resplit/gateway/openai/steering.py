"""Penalties, biases and grammars as changes of logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from resplit.types import LogitChange


class Grammar(Protocol):
    """The texts that an answer may be, by tokens."""

    def allowed(self, made: Sequence[int], drafts: Sequence[int]) -> list[bytes]:
        """The tokens that may follow `made`, and those that may follow each of `drafts`, as in `LogitChange`."""
        ...


@dataclass(frozen=True)
class RequestSteering:
    """The changes that one request asks for.

    `bias` is added to the logits of its tokens. Of each token that was made n times, n times `frequency_penalty` is
    subtracted, and `presence_penalty` if n is not 0.
    """

    bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: Grammar | None = None

    def changes(self, made: Sequence[int], drafts: Sequence[int]) -> tuple[LogitChange, ...]:
        """The change after the new tokens `made`, and those after each of the guesses `drafts` that follow them."""
        allowed = self.grammar.allowed(made, drafts) if self.grammar else [b""] * (len(drafts) + 1)
        counts, found = Counter(made if self._penalises else ()), []
        for place, bits in enumerate(allowed):
            if place and self._penalises:
                counts[drafts[place - 1]] += 1
            found.append(LogitChange(bits, self._added(counts)))
        return tuple(found)

    @property
    def _penalises(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty)

    def _added(self, counts: Mapping[int, int]) -> dict[int, float]:
        added = dict(self.bias)
        for token, count in counts.items():
            penalty = self.presence_penalty + count * self.frequency_penalty
            added[token] = added.get(token, 0.0) - penalty
        return added
