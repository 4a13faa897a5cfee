"""The answers to the passes of one session: which belong to the pass under way, and what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from resplit.errors import error_from_wire
from resplit.types import Logprobs
from resplit.wire.choices import logprobs_from_wire
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route


@dataclass(frozen=True)
class New:
    """The new tokens of one pass, with their log probabilities if they are wanted.

    Those of a follow-up came `took_s` after the token before.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    took_s: float | None = None


@dataclass(frozen=True)
class Awaited:
    """What the nodes of `route` may answer in an attempt to a pass over positions `start..end-1`.

    The head answers with so many `tokens`, or with parts of a `scored` prompt; any node may answer with an error. The
    node of the head may itself begin the passes after it that start before position `until`.
    """

    route: Route
    attempt: int
    start: int
    end: int
    tokens: int
    logprobs: bool
    scored: bool
    until: int = 0

    def fits(self, node: str, answer: Token) -> bool:
        """Whether `node` may answer this."""
        if (answer.epoch, answer.attempt) != (self.route.epoch, self.attempt):
            return False
        if answer.error_kind:
            # The error of a later pass may overtake the tokens before it: they come from another node.
            return node in self.route.placement and self.start <= answer.position <= max(self.end, self.until)
        return node == self.route.placement[-1] and self._fits_head(answer)

    def following(self) -> Awaited | None:
        """The pass after this one, if the node of the head may begin it itself."""
        if self.end >= self.until:
            return None
        return replace(self, start=self.end, end=self.end + 1, tokens=1, scored=False)

    def _fits_head(self, answer: Token) -> bool:
        found = len(answer.logprobs)
        if self.scored and not answer.token_ids:
            return self.start < answer.position < self.end and 0 < found <= answer.position
        least = self.tokens if self.logprobs else 0
        expected = least <= found <= self.end if self.scored else found == least
        return (answer.position, len(answer.token_ids)) == (self.end, self.tokens) and expected


class PassAnswers:
    """The answers to a session's passes. At most one pass is under way; a loss is queued as an answer to it.

    `scores` are the log probabilities of prompt tokens, by position. `awaited` is the pass under way, if there is one.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.scores: dict[int, Logprobs] = {}
        self.awaited: Awaited | None = None
        self._prompt_tokens = prompt_tokens
        self._queue: asyncio.Queue[Token] = asyncio.Queue()
        self._take: Callable[[Token], None] = self._queue.put_nowait

    def expect(self, awaited: Awaited) -> None:
        """A pass is under way from now on."""
        self.awaited = awaited

    def extend(self, until: int) -> None:
        """The node of the head may begin passes that start before this position itself."""
        if self.awaited and until > self.awaited.until:  # it may have begun what it may not begin any more
            self.awaited = replace(self.awaited, until=until)

    def accept(self, node: str, answer: Token) -> bool:
        """Take the answer of `node` if it belongs to the pass under way; returns whether it does.

        Its `followed` then says whether another pass is under way.
        """
        awaited = self.awaited
        if awaited is None or not awaited.fits(node, answer):
            return False
        if answer.error_kind or answer.token_ids:
            self.awaited = awaited.following() if answer.followed and not answer.error_kind else None
            answer.followed = self.awaited is not None
        self._take(answer)
        return True

    def lose(self, lost: Token) -> None:
        """End the pass under way, or the next one if there is none, with `lost`."""
        self.awaited = None
        self._take(lost)

    def forget(self) -> None:
        """Forget what was queued: a new attempt begins."""
        self.awaited = None
        self._queue = asyncio.Queue()
        self._take = self._queue.put_nowait

    def redirect(self, take: Callable[[Token], None]) -> None:
        """Have `take` get the answers that are queued, and each later one as it comes, until `queue_again`."""
        self._take = take
        while self._take is take and not self._queue.empty():
            take(self._queue.get_nowait())

    def queue_again(self) -> None:
        """Queue the answers from now on, for `last`."""
        self._take = self._queue.put_nowait

    async def last(self) -> Token:
        """The answer that ends the pass under way; raises its error. Parts of a scored prompt come before it."""
        while not (answer := await self._queue.get()).token_ids and not answer.error_kind:
            self._note_scores(answer)
        if answer.error_kind:
            raise error_of(answer)
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


def error_of(answer: Token) -> Exception:
    """The error with which a pass ended."""
    # A node that restarted has neither the epoch nor the caches: for the session it is lost.
    word = "lost" if answer.error_kind == "stale" else answer.error_kind
    return error_from_wire(word, answer.error)
