"""Turns a request of the API into a generation of the engine, and the generation into an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from resplit.errors import RequestError
from resplit.gateway.engine import GenerationRequest, TokenEngine
from resplit.gateway.openai.bodies import ModelCard
from resplit.gateway.openai.completion import Choice, Envelope, TextPiece, merged, pieces
from resplit.gateway.openai.event_stream import EventStream, begun, event_data
from resplit.gateway.openai.grammars import Grammars
from resplit.gateway.openai.http_errors import http_error
from resplit.gateway.openai.messages import Message
from resplit.gateway.openai.prometheus import Stopwatch
from resplit.gateway.openai.response_schemas import ResponseRequest
from resplit.gateway.openai.responses import ResponseForm
from resplit.gateway.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from resplit.gateway.openai.special_tokens import texts
from resplit.gateway.openai.template_input import TemplateTool
from resplit.gateway.openai.text import Text


@dataclass(frozen=True)
class Caller:
    """Who sends a request, and the class and deadline in its headers. `deadline_s` counts from the arrival."""

    request_class: str
    deadline_s: float
    client: str


@dataclass(frozen=True, eq=False)
class CompletionService:
    """Answers completions, chats and responses of one model."""

    engine: TokenEngine
    text: Text
    model_name: str
    grammars: Grammars
    started_s: int = field(default_factory=lambda: int(time.time()))

    def model_card(self) -> ModelCard:
        """The model as /v1/models lists it."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.started_s,
            "owned_by": "resplit",
            "max_model_len": self.engine.context_tokens,
        }

    def check_model(self, name: str) -> None:
        """HTTPException (404) unless `name` is the model that is served."""
        if name != self.model_name:
            shown = json.dumps(name[:200])
            raise http_error(404, f"the model {shown} does not exist; see /v1/models", "model_not_found", "model")

    def tokenize(self, body: TokenizeRequest) -> tuple[int, ...]:
        """The token ids of a prompt or a conversation; HTTPException (400) if it is longer than any context."""
        if body.model is not None:
            self.check_model(body.model)
        return self._encode(body.prompt) if body.messages is None else self._encode_chat(body.messages)

    def detokenize(self, body: DetokenizeRequest) -> str:
        """The text of token ids; HTTPException (400) if one is unknown, or if no context has so many."""
        if body.model is not None:
            self.check_model(body.model)
        self._check_ids(tuple(body.tokens), "tokens")
        if len(body.tokens) > self.engine.context_tokens:
            raise self._too_long(f"there are {len(body.tokens)}")
        return self.text.decode(body.tokens)

    async def complete(self, body: CompletionRequest, caller: Caller, stopwatch: Stopwatch) -> Response:
        """Continue prompts, each a text or token ids."""
        self.check_model(body.model)
        prompts = [await self._prompt_ids(prompt) for prompt in body.prompt]
        choices = self._choices(body, prompts, caller, stopwatch)
        if body.echo:
            texts = [each if isinstance(each, str) else self.text.decode(each) for each in body.prompt]
            each_text = [text for text in texts for _ in range(body.n or 1)]
            choices = [
                replace(
                    choice,
                    request=replace(choice.request, score_prompt=body.logprobs is not None),
                    echo=text,
                    only_echo=body.max_tokens == 0,
                )
                for choice, text in zip(choices, each_text, strict=True)
            ]
        prompt_tokens, ids = sum(map(len, prompts)), bool(body.return_token_ids)
        envelope = Envelope(self.model_name, self.text, False, prompt_tokens, ids, body.include_usage)
        return await self._answer(body, choices, envelope, stopwatch)

    async def chat(self, body: ChatRequest, caller: Caller, stopwatch: Stopwatch) -> Response:
        """Answer a conversation as the assistant."""
        choices, prompt_tokens = await self._chat_choices(body, caller, stopwatch)
        envelope = Envelope(self.model_name, self.text, True, prompt_tokens, include_usage=body.include_usage)
        return await self._answer(body, choices, envelope, stopwatch)

    async def respond(self, body: ResponseRequest, caller: Caller, stopwatch: Stopwatch) -> Response:
        """Answer a conversation in the newer form of the API."""
        chat = body.chat()
        choices, prompt_tokens = await self._chat_choices(chat, caller, stopwatch)
        return await self._answer(chat, choices, ResponseForm(body, prompt_tokens), stopwatch)

    async def _chat_choices(self, body: ChatRequest, caller: Caller, stopwatch: Stopwatch) -> tuple[list[Choice], int]:
        """The choices of a chat, and the tokens of its prompt."""
        self.check_model(body.model)
        prompt = self._encode_chat(body.messages, body.callable_tools())
        self._check_ids(prompt, "messages")
        choices = self._choices(body, [prompt], caller, stopwatch)
        form = self.text.tool_form
        if lark := body.lark(form):
            grammar = await asyncio.to_thread(self.grammars.compiled, lark)
            choices = [
                replace(
                    choice,
                    request=replace(choice.request, steering=body.steering(grammar.copy())),
                    form=form if body.callable_tools() else None,
                )
                for choice in choices
            ]
        return choices, len(prompt)

    def _choices(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[tuple[int, ...]],
        caller: Caller,
        stopwatch: Stopwatch,
    ) -> list[Choice]:
        """The choices of an answer: `n` for each prompt. Each draws with a seed of its own."""
        self._check_ids(tuple(body.bias()), "logit_bias")
        self._check_ids(tuple(body.stop_token_ids or ()), "stop_token_ids")
        deadline_s = caller.deadline_s - (time.monotonic() - stopwatch.arrival_s)
        sampling = body.sampling()
        stop_ids = frozenset[int]() if body.ignore_eos else self.text.stop_ids
        found: list[Choice] = []
        for prompt in prompts:
            request = GenerationRequest(
                prompt_ids=prompt,
                max_new_tokens=self._max_new_tokens(body, prompt, caller.request_class, deadline_s),
                sampling=sampling,
                request_class=caller.request_class,
                stop_ids=stop_ids | frozenset(body.stop_token_ids or ()),
                deadline_s=deadline_s,
                until_deadline=body.new_tokens is None,
                logprobs=body.most_likely,
                client=caller.client,
            )
            for number in range(body.n or 1):
                seeded = replace(sampling, seed=sampling.seed + number)
                own = replace(request, sampling=seeded, steering=body.steering())
                found.append(Choice(own, body.stop))
        stopwatch.admit(caller.request_class, sum(map(len, prompts)))
        return found

    async def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        choices: Sequence[Choice],
        form: Envelope | ResponseForm,
        stopwatch: Stopwatch,
    ) -> Response:
        parts = merged([pieces(self.engine, choice, self.text, stopwatch) for choice in choices])
        if body.stream:
            first = await begun(parts)
            events = event_data(first, parts, form, len(choices), stopwatch)
            return EventStream(first, events)
        found: list[list[TextPiece]] = [[] for _ in choices]
        async with aclosing(parts):
            async for index, piece in parts:
                found[index].append(piece)
        return JSONResponse(form.whole(found))

    def _encode_chat(self, messages: Sequence[Message], tools: Sequence[TemplateTool] = ()) -> tuple[int, ...]:
        if len(messages) > self.engine.context_tokens:
            raise self._too_long(f"the conversation has {len(messages)} messages")
        plain = [message.plain() for message in messages]
        said = [(message["content"], message.get("tool_calls", ())) for message in plain]
        self._check_length("".join(texts([said, tools])))
        return self.text.encode_chat(plain, tools)

    async def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        await asyncio.sleep(0)  # other requests go on between two prompts
        ids = self._encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        self._check_ids(ids, "prompt")
        return ids

    def _encode(self, prompt: str | None) -> tuple[int, ...]:
        self._check_length(prompt or "")
        return self.text.encode(prompt or "")

    def _check_ids(self, prompt: tuple[int, ...], key: str) -> None:
        """HTTPException (400) for a token that the model does not know. A tokenizer may know more than its model."""
        if max(prompt, default=0) >= self.text.vocabulary:
            rule = f"token ids must be below {self.text.vocabulary}; found {max(prompt)}"
            raise http_error(400, f"invalid {key!r}: {rule}", "invalid_value", key)

    def _check_length(self, prompt: str) -> None:
        # Tokenizing a megabyte would block all streams for half a second, so a long prompt is refused before that.
        if (least := self.text.least_tokens(prompt)) > self.engine.context_tokens:
            raise self._too_long(f"the prompt has at least {least}")

    def _max_new_tokens(
        self, body: CompletionRequest | ChatRequest, prompt: tuple[int, ...], request_class: str, deadline_s: float
    ) -> int:
        """How many tokens may be generated: as requested, or else what is usual, and never more than fit."""
        if not prompt:
            raise RequestError("the prompt is empty")
        wanted, room = body.new_tokens, self.engine.context_tokens - len(prompt)
        if wanted is None:
            wanted = body.default_tokens
        elif wanted == 0:  # only the prompt's echo is wanted, but its log probabilities come with a token
            wanted = 1
        least = wanted or 1
        if room < least:
            raise self._too_long(f"the request has {len(prompt)} in the prompt and {least} to generate")
        return wanted or min(
            room, body.default_tokens or self.engine.usual_tokens(request_class, len(prompt), deadline_s)
        )

    def _too_long(self, found: str) -> HTTPException:
        rule = f"this model's maximum context length is {self.engine.context_tokens} tokens"
        return http_error(400, f"{rule}; {found}; shorten the prompt or lower max_tokens", "context_length_exceeded")
