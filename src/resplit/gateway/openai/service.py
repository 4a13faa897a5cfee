"""Turns a request of the API into a generation of the engine, and the generation into an answer."""

from __future__ import annotations

import json
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from resplit.errors import RequestError
from resplit.gateway.engine import Engine, GenerationRequest
from resplit.gateway.openai.completion import Envelope, pieces
from resplit.gateway.openai.event_stream import EventStream, event_data
from resplit.gateway.openai.http_errors import http_error
from resplit.gateway.openai.metrics import Stopwatch
from resplit.gateway.openai.schemas import ChatRequest, CompletionRequest
from resplit.gateway.openai.text import Text


@dataclass(frozen=True)
class Caller:
    """The request class and the deadline in a request's headers. `deadline_s` counts from the arrival."""

    request_class: str
    deadline_s: float


@dataclass(frozen=True, eq=False)
class CompletionService:
    """Answers completions and chats of one model."""

    engine: Engine
    text: Text
    model_name: str
    started_s: int = field(default_factory=lambda: int(time.time()))

    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        return {"id": self.model_name, "object": "model", "created": self.started_s, "owned_by": "resplit"}

    def check_model(self, name: str) -> None:
        """HTTPException (404) unless `name` is the model that is served."""
        if name != self.model_name:
            shown = json.dumps(name[:200])
            raise http_error(404, f"the model {shown} does not exist; see /v1/models", "model_not_found", "model")

    async def complete(self, body: CompletionRequest, caller: Caller, stopwatch: Stopwatch) -> Response:
        """Continue a prompt, which is a text or token ids."""
        self.check_model(body.model)
        prompt = self._encode(body.prompt) if isinstance(body.prompt, str) else tuple(body.prompt)
        self._check_ids(prompt, "prompt")
        envelope = Envelope(self.model_name, False, len(prompt), bool(body.return_token_ids))
        return await self._answer(body, prompt, bool(body.ignore_eos), envelope, caller, stopwatch)

    async def chat(self, body: ChatRequest, caller: Caller, stopwatch: Stopwatch) -> Response:
        """Answer a conversation as the assistant."""
        self.check_model(body.model)
        for message in body.messages:
            self._check_length(message.content)
        prompt = self.text.encode_chat([message.plain() for message in body.messages])
        self._check_ids(prompt, "messages")
        return await self._answer(body, prompt, False, Envelope(self.model_name, True, len(prompt)), caller, stopwatch)

    async def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        prompt: tuple[int, ...],
        ignore_eos: bool,
        envelope: Envelope,
        caller: Caller,
        stopwatch: Stopwatch,
    ) -> Response:
        request = GenerationRequest(
            prompt_ids=prompt,
            max_new_tokens=self._max_new_tokens(len(prompt), body.new_tokens),
            sampling=body.sampling(),
            request_class=caller.request_class,
            stop_ids=frozenset() if ignore_eos else self.text.stop_ids,
            deadline_s=caller.deadline_s - (time.monotonic() - stopwatch.arrival_s),
        )
        stopwatch.admit(caller.request_class)
        parts = pieces(self.engine, request, self.text, body.stop, stopwatch)
        if body.stream:
            # An error before the first token becomes a status; a later one can only become an event of the stream.
            first = await anext(parts)
            return EventStream(event_data(first, parts, envelope, body.include_usage, stopwatch))
        async with aclosing(parts):
            return JSONResponse(envelope.whole([part async for part in parts]))

    def _encode(self, prompt: str) -> tuple[int, ...]:
        self._check_length(prompt)
        return self.text.encode(prompt)

    def _check_ids(self, prompt: tuple[int, ...], key: str) -> None:
        """HTTPException (400) for a token that the model does not know. A tokenizer may know more than its model."""
        if max(prompt, default=0) >= self.text.vocabulary:
            rule = f"token ids must be below {self.text.vocabulary}; found {max(prompt)}"
            raise http_error(400, f"invalid {key!r}: {rule}", "invalid_value", key)

    def _check_length(self, prompt: str) -> None:
        # Tokenizing a megabyte would block all streams for half a second, so a long prompt is refused before that.
        if (least := self.text.least_tokens(prompt)) > self.engine.context_tokens:
            raise self._too_long(f"the prompt has at least {least}")

    def _max_new_tokens(self, prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens may be generated: `wanted`, or by default (None) all that fit the context."""
        if not prompt_tokens:
            raise RequestError("the prompt is empty")
        room = self.engine.context_tokens - prompt_tokens
        if room < (wanted or 1):
            raise self._too_long(f"the request has {prompt_tokens} in the prompt and {wanted or 1} to generate")
        return wanted or room

    def _too_long(self, found: str) -> HTTPException:
        rule = f"this model's maximum context length is {self.engine.context_tokens} tokens"
        return http_error(400, f"{rule}; {found}; shorten the prompt or lower max_tokens", "context_length_exceeded")
