"""Prompt lookup: drafts of a session's next tokens, taken from its own tokens, and how often such drafts are right.

After the last two tokens it expects what followed them the last time. Every new token shows whether that was right,
also while no draft is used: so the rate of hits is known before the first draft is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Hits expected before any were seen, by run: after so many hits in a row (or more, for the last one).
_FIRST_RATES = (0.2, 0.4, 0.6, 0.8)
_FIRST_WEIGHT = 2.0  # they count as much as so many observations
_MEMORY = 0.95  # weight of earlier observations at each new one


@dataclass
class _Rate:
    """A share that forgets what is long ago."""

    hits: float
    seen: float = _FIRST_WEIGHT

    def observe(self, hit: bool) -> None:
        self.hits = _MEMORY * self.hits + hit
        self.seen = _MEMORY * self.seen + 1

    @property
    def value(self) -> float:
        return self.hits / self.seen


class PromptLookup:
    """The tokens of one session. Each new token costs a dictionary entry and a comparison."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, int], int] = {}  # the position after the latest occurrence of two tokens
        self._expected: int | None = None  # the position of the token that is expected to come next
        self._run = 0  # hits in a row
        self._rates = [_Rate(_FIRST_WEIGHT * rate) for rate in _FIRST_RATES]
        for token in prompt:
            self._follow(token)

    def add(self, tokens: Sequence[int]) -> None:
        """Add the session's next tokens."""
        for token in tokens:
            if self._expected is not None:
                self._rate(self._run).observe(token == self._tokens[self._expected])
            self._follow(token)

    def drafts(self, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that are expected to come next; none if the last two tokens are new."""
        if self._expected is None:
            return ()
        found: list[int] = []
        known = len(self._tokens)
        for position in range(self._expected, self._expected + most):
            found.append(self._tokens[position] if position < known else found[position - known])
        return tuple(found)

    def hit_rates(self, most: int) -> list[float]:
        """For each of `most` drafts, how likely it is right if those before it are; empty if there is no draft."""
        if self._expected is None:
            return []
        return [self._rate(self._run + number).value for number in range(most)]

    def _rate(self, run: int) -> _Rate:
        return self._rates[min(run, len(self._rates) - 1)]

    def _follow(self, token: int) -> None:
        """Append a token, and expect the next one: where the run goes on, or after the latest occurrence."""
        self._tokens.append(token)
        if self._expected is not None and self._tokens[self._expected] == token:
            self._run += 1
            self._expected += 1
        else:
            self._run, self._expected = 0, None
        last_two = tuple(self._tokens[-2:])
        if len(last_two) == 2:
            before = self._after.get(last_two)
            if self._expected is None:
                self._expected = before
            self._after[last_two] = len(self._tokens)
