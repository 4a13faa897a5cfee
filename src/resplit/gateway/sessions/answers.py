"""What a session awaits of the pass under way, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass

from resplit.types import Logprobs
from resplit.wire.node_pb2 import Token


@dataclass(frozen=True)
class New:
    """The new tokens of one pass, with their log probabilities if they are wanted."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True)
class Awaited:
    """What the head answers to a pass that ends at position `end`: so many tokens, or parts of a `scored` prompt."""

    end: int
    tokens: int
    logprobs: bool
    scored: bool

    def fits(self, answer: Token, start: int) -> bool:
        """Whether this is such an answer; the pass begins at position `start`."""
        found = len(answer.logprobs)
        if self.scored and not answer.token_ids:
            return start < answer.position < self.end and 0 < found <= answer.position
        least = self.tokens if self.logprobs else 0
        expected = least <= found <= self.end if self.scored else found == least
        return (answer.position, len(answer.token_ids)) == (self.end, self.tokens) and expected
