"""The interface between the gateway's two halves: the HTTP API calls it, and the sessions implement it.

A call takes one request and yields its tokens. The type of an exception says what went wrong. Tokens are ids: only the
HTTP API handles text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from resplit.types import LogitChange, Logprobs, Sampling


class Steering(Protocol):
    """What changes the logits of one request: penalties, a bias, or a grammar. Depends on the tokens so far alone."""

    def changes(self, made: Sequence[int], drafts: Sequence[int]) -> tuple[LogitChange, ...]:
        """The change after the new tokens `made`, and those after each of the guesses `drafts` that follow them."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue, prompt and new tokens together within the engine's `context_tokens`.

    Generation ends with the first token out of `stop_ids` (empty: the end of text is ignored) or after
    `max_new_tokens`. `deadline_s` counts from the call of `generate`; None is no deadline. With `until_deadline`, the
    deadline ends the tokens like the limit does, unless there is none yet. With `logprobs`, each new token comes with
    its log probability and those of so many of the most likely tokens; with `score_prompt`, prompt tokens do too.
    Requests of different `client`s get room in turn.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    request_class: str
    stop_ids: frozenset[int]
    deadline_s: float | None = None
    until_deadline: bool = False
    steering: Steering | None = None
    logprobs: int | None = None
    score_prompt: bool = False
    client: str = ""


@dataclass(frozen=True)
class GeneratedToken:
    """The new token number `index` (from 0). The last one has a `finish`: "stop" if it is one of `stop_ids`.

    If the deadline ended the tokens, the last one has none. `prompt_logprobs` come with the first token, if they are
    wanted: one for each prompt token but the first.
    """

    token_id: int
    index: int
    finish: Literal["stop", "length"] | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] = ()


class TokenEngine(Protocol):
    """Generates tokens for many requests at once, on one event loop."""

    @property
    def context_tokens(self) -> int:
        """Limit of prompt and new tokens of one request."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the request classes."""
        ...

    @property
    def default_class(self) -> str:
        """The class of a request that names none."""
        ...

    def usual_tokens(self, request_class: str, prompt_tokens: int, deadline_s: float) -> int:
        """How many tokens to generate for a request that does not say: what its class expects and its deadline allows.

        At least 1; the context may allow less.
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        """The tokens of `request` as they are made. Closing the iterator (`aclose`) cancels the request.

        Raises, if possible before the first token: CapacityError (no room now), RequestError (the request can never
        be served), NodeLostError (the remaining nodes cannot serve), TimeoutError (`deadline_s` has passed).
        """
        ...

    def ready(self) -> str | None:
        """None if the engine can serve, else the reason."""
        ...
