"""The answers to the passes of one session: which belong to the pass under way, and what they say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from resplit.errors import error_from_wire
from resplit.types import Logprobs
from resplit.wire.choices import logprobs_from_wire
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route


@dataclass(frozen=True)
class New:
    """The new tokens of one pass, with their log probabilities if they are wanted."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True)
class Awaited:
    """What the nodes of `route` may answer in an attempt to a pass over positions `start..end-1`.

    The head answers with so many `tokens`, or with parts of a `scored` prompt; any node may answer with an error.
    """

    route: Route
    attempt: int
    start: int
    end: int
    tokens: int
    logprobs: bool
    scored: bool

    def fits(self, node: str, answer: Token) -> bool:
        """Whether `node` may answer this."""
        if (answer.epoch, answer.attempt) != (self.route.epoch, self.attempt):
            return False
        if answer.error_kind:
            return node in self.route.placement and self.start <= answer.position <= self.end
        return node == self.route.placement[-1] and self._fits_head(answer)

    def _fits_head(self, answer: Token) -> bool:
        found = len(answer.logprobs)
        if self.scored and not answer.token_ids:
            return self.start < answer.position < self.end and 0 < found <= answer.position
        least = self.tokens if self.logprobs else 0
        expected = least <= found <= self.end if self.scored else found == least
        return (answer.position, len(answer.token_ids)) == (self.end, self.tokens) and expected


class PassAnswers:
    """The answers to a session's passes. At most one pass is under way; a loss is queued as an answer to it.

    `scores` are the log probabilities of prompt tokens, by position.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.scores: dict[int, Logprobs] = {}
        self._prompt_tokens = prompt_tokens
        self._queue: asyncio.Queue[Token] = asyncio.Queue()
        self._awaited: Awaited | None = None

    @contextlib.contextmanager
    def awaiting(self, awaited: Awaited) -> Iterator[None]:
        """A context in which a pass is under way."""
        self._awaited = awaited
        try:
            yield
        finally:
            self._awaited = None

    def accept(self, node: str, answer: Token) -> bool:
        """Take the answer of `node` if it belongs to the pass under way; returns whether it does."""
        fits = self._awaited is not None and self._awaited.fits(node, answer)
        if fits:
            self._queue.put_nowait(answer)
        return fits

    def lose(self, lost: Token) -> None:
        """End the pass under way, or the next one if there is none, with `lost`."""
        self._queue.put_nowait(lost)

    def forget(self) -> None:
        """Forget what was queued: a new attempt begins."""
        self._queue = asyncio.Queue()

    async def last(self) -> Token:
        """The answer that ends the pass under way; raises its error. Parts of a scored prompt come before it."""
        while not (answer := await self._queue.get()).token_ids and not answer.error_kind:
            self._note_scores(answer)
        if answer.error_kind:
            raise _error_of(answer)
        if len(answer.logprobs) > len(answer.token_ids):
            self._note_scores(answer)
            del answer.logprobs[: -len(answer.token_ids)]
        return answer

    def _note_scores(self, answer: Token) -> None:
        """Keep the log probabilities of prompt tokens in an answer. Its last one is of the token at its position."""
        first = answer.position - len(answer.logprobs) + 1
        for place, found in enumerate(logprobs_from_wire(answer.logprobs), first):
            if 0 < place < self._prompt_tokens:
                self.scores[place] = found


def _error_of(answer: Token) -> Exception:
    """The error with which a pass ended."""
    # A node that restarted has neither the epoch nor the caches: for the session it is lost.
    word = "lost" if answer.error_kind == "stale" else answer.error_kind
    return error_from_wire(word, answer.error)
