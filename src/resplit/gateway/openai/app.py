"""The gateway's HTTP API, as OpenAI's clients speak it, in front of any `Engine`.

Admits requests, words answers and errors. Knows nothing of nodes, and nothing of how tokens are made.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from resplit.config import LimitsConfig
from resplit.errors import ConfigError, RequestError, ResplitError
from resplit.gateway.engine import Engine, GenerationRequest
from resplit.gateway.openai.completion import Envelope, Piece, pieces
from resplit.gateway.openai.http_errors import as_http, body_of, http_error, response
from resplit.gateway.openai.metrics import RequestMetrics, Stopwatch
from resplit.gateway.openai.middleware import RequestLimits
from resplit.gateway.openai.schemas import ChatRequest, CompletionRequest
from resplit.gateway.openai.text import Text

_log = structlog.get_logger(__name__)
_METERED = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Caller:
    """Who asks: the class of the request, and how long it may take from its arrival."""

    request_class: str
    deadline_s: float


def create_app(
    engine: Engine,
    text: Text | Path,
    model_name: str,
    limits: LimitsConfig,
    api_keys: Mapping[str, str],
    require_key: bool,
    metrics: RequestMetrics | None = None,
) -> FastAPI:
    """The application. `text` is the model's tokenizer or its folder, `api_keys` maps a key to its request class.

    The class of a request comes from its key, else from the header X-Resplit-Class, else it is the engine's default.
    Without `require_key` an unknown key is as good as none. Other parts may add their own to `metrics`.
    Raises ConfigError where a key names a class that the engine does not know.
    """
    metrics = metrics or RequestMetrics()
    app = FastAPI(title="resplit", docs_url=None, redoc_url=None)
    app.state.service = CompletionService(
        engine,
        text if isinstance(text, Text) else Text.from_folder(text),
        model_name,
        limits,
        metrics,
        _hashed(api_keys, engine.classes),
        require_key,
    )
    app.add_middleware(RequestLimits, metrics=metrics, limits=limits, metered=_METERED)
    for kind in (HTTPException, RequestValidationError, ResplitError, TimeoutError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.include_router(_router)
    return app


@dataclass(frozen=True, eq=False)
class CompletionService:
    """Admits requests and answers them."""

    engine: Engine
    text: Text
    model_name: str
    limits: LimitsConfig
    metrics: RequestMetrics
    key_classes: Mapping[bytes, str]
    require_key: bool
    since: int = field(default_factory=lambda: int(time.time()))

    def described(self) -> dict[str, Any]:
        """The model that is served, as /v1/models tells of it."""
        return {"id": self.model_name, "object": "model", "created": self.since, "owned_by": "resplit"}

    def check_model(self, name: str) -> None:
        """404 for any model but the one that is served."""
        if name != self.model_name:
            shown = json.dumps(name[:200])
            raise http_error(404, f"the model {shown} does not exist; see /v1/models", "model_not_found", "model")

    async def complete(self, body: CompletionRequest, caller: Caller, stopwatch: Stopwatch) -> Response:
        """The answer to a plain prompt."""
        self.check_model(body.model)
        prompt = self._ids(body.prompt) if isinstance(body.prompt, str) else self._known(body.prompt)
        envelope = Envelope(self.model_name, False, len(prompt), bool(body.return_token_ids))
        return await self._answer(body, prompt, bool(body.ignore_eos), envelope, caller, stopwatch)

    async def chat(self, body: ChatRequest, caller: Caller, stopwatch: Stopwatch) -> Response:
        """The assistant's answer to a conversation."""
        self.check_model(body.model)
        for message in body.messages:
            self._not_far_too_long(message.content)
        prompt = self.text.encode_chat([message.plain() for message in body.messages])
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
            max_new_tokens=self._room(len(prompt), body.new_tokens),
            sampling=body.sampling(),
            request_class=caller.request_class,
            stop_ids=frozenset() if ignore_eos else self.text.stop_ids,
            deadline_s=caller.deadline_s - (time.monotonic() - stopwatch.arrival_s),
        )
        stopwatch.admit(caller.request_class)
        parts = pieces(self.engine, request, self.text, body.stop, stopwatch)
        if body.stream:
            # Errors up to here become a status; after the first token they can only be told in the stream.
            first = await anext(parts)
            return _EventStream(_events(first, parts, envelope, body.include_usage, stopwatch))
        async with aclosing(parts):
            return JSONResponse(envelope.whole([part async for part in parts]))

    def class_of_key(self, authorization: str) -> str | None:
        """The class of the key in an Authorization header, None without one; 401 where a key is needed."""
        scheme, _, key = authorization.partition(" ")
        found = self.key_classes.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if found is None and self.require_key:
            told = {"WWW-Authenticate": "Bearer"}
            raise http_error(
                401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key", headers=told
            )
        return found

    def _ids(self, prompt: str) -> tuple[int, ...]:
        self._not_far_too_long(prompt)
        return self.text.encode(prompt)

    def _known(self, prompt: list[int]) -> tuple[int, ...]:
        if max(prompt) >= self.text.vocabulary:
            rule = f"token ids must be below {self.text.vocabulary}; found {max(prompt)}"
            raise http_error(400, f"invalid 'prompt': {rule}", "invalid_value", "prompt")
        return tuple(prompt)

    def _not_far_too_long(self, prompt: str) -> None:
        # Tokenizing a megabyte holds up every stream for half a second: such a prompt is refused unread.
        if (least := self.text.least_tokens(prompt)) > self.engine.context_tokens:
            raise self._too_long(f"the prompt has at least {least}")

    def _room(self, prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens may be generated: as many as `wanted`, None being all that fit."""
        if not prompt_tokens:
            raise RequestError("the prompt is empty")
        room = self.engine.context_tokens - prompt_tokens
        if room < (wanted or 1):
            raise self._too_long(f"{prompt_tokens} in the prompt and {wanted or 1} to generate were requested")
        return wanted or room

    def _too_long(self, found: str) -> HTTPException:
        rule = f"this model's maximum context length is {self.engine.context_tokens} tokens"
        return http_error(400, f"{rule}; {found}; shorten the prompt or lower max_tokens", "context_length_exceeded")


async def _events(
    first: Piece, rest: AsyncGenerator[Piece], envelope: Envelope, include_usage: bool, stopwatch: Stopwatch
) -> AsyncGenerator[str]:
    """The data of the server-sent events of one answer; after an error, that error is the last one."""
    nothing = {"usage": None} if include_usage else {}
    piece, count = first, 1
    async with aclosing(rest):
        try:
            for chunk in envelope.opening():
                yield json.dumps(chunk | nothing)
            while True:
                for chunk in envelope.chunk(piece):
                    yield json.dumps(chunk | nothing)
                if piece.finish:
                    break
                piece, count = await anext(rest), count + 1
            if include_usage:
                yield json.dumps(envelope.usage_chunk(count))
            yield "[DONE]"
        except Exception as error:
            refusal = as_http(error)
            stopwatch.status = refusal.status_code
            if refusal.status_code == 500:
                _log.exception("a stream failed", answer=envelope.key)
            yield body_of(refusal)


class _EventStream(Response):
    """Server-sent events, sent by the task that runs the request: cancelling it closes the generation behind."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _service(request: Request) -> CompletionService:
    service: CompletionService = request.app.state.service
    return service


def _caller(
    service: Annotated[CompletionService, Depends(_service)],
    authorization: Annotated[str | None, Header()] = None,
    x_resplit_class: Annotated[str | None, Header()] = None,
    x_resplit_deadline_s: Annotated[float | None, Header(gt=0, allow_inf_nan=False)] = None,
) -> Caller:
    """Who asks. 401 without a key where one is needed, 400 for an unknown class."""
    request_class = service.class_of_key(authorization or "") or x_resplit_class or service.engine.default_class
    if request_class not in service.engine.classes:
        known = ", ".join(service.engine.classes)
        raise http_error(400, f"unknown request class; the classes are {known}", "invalid_value", "X-Resplit-Class")
    return Caller(request_class, min(x_resplit_deadline_s or math.inf, service.limits.deadline))


_ServiceNeeded = Annotated[CompletionService, Depends(_service)]
_CallerNeeded = Annotated[Caller, Depends(_caller)]
_router = APIRouter()


@_router.post("/v1/completions")
async def completions(
    body: CompletionRequest, request: Request, service: _ServiceNeeded, caller: _CallerNeeded
) -> Response:
    """Continue a prompt."""
    return await service.complete(body, caller, request.state.stopwatch)


@_router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatRequest, request: Request, service: _ServiceNeeded, caller: _CallerNeeded
) -> Response:
    """Answer a conversation."""
    return await service.chat(body, caller, request.state.stopwatch)


@_router.get("/v1/models")
async def models(service: _ServiceNeeded, caller: _CallerNeeded) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [service.described()]}


@_router.get("/v1/models/{name:path}")
async def model(name: str, service: _ServiceNeeded, caller: _CallerNeeded) -> dict[str, Any]:
    """The model of that name."""
    service.check_model(name)
    return service.described()


@_router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@_router.get("/readyz")
async def readyz(service: _ServiceNeeded) -> JSONResponse:
    """The engine can serve; 503 and the reason where it cannot."""
    if reason := service.engine.ready():
        return JSONResponse({"status": "unready", "reason": reason}, 503)
    return JSONResponse({"status": "ok"})


@_router.get("/metrics")
async def exposition(service: _ServiceNeeded) -> Response:
    """Everything that is counted, for Prometheus."""
    return Response(service.metrics.expose(), media_type=CONTENT_TYPE_LATEST)


async def _on_error(request: Request, error: Exception) -> Response:
    return response(error)


def _hashed(api_keys: Mapping[str, str], classes: tuple[str, ...]) -> dict[bytes, str]:
    for name in api_keys.values():
        if name not in classes:
            raise ConfigError("api_keys", f"class {name!r} is not one of {', '.join(classes)}")
    return {_digest(key): name for key, name in api_keys.items()}


def _digest(key: str) -> bytes:
    # Looking up digests, not keys: how long a look-up takes tells nothing about a key.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
