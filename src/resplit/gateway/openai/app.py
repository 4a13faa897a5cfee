"""The routes of the gateway's HTTP API, which follows OpenAI's, above any `TokenEngine`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from resplit.config import LimitsConfig
from resplit.errors import ResplitError
from resplit.gateway.engine import TokenEngine
from resplit.gateway.openai.api_keys import ApiKeys
from resplit.gateway.openai.bodies import DetokenizedPrompt, ModelCard, ModelList, TokenizedPrompt
from resplit.gateway.openai.http_errors import RETRY_AFTER_S, http_error, response
from resplit.gateway.openai.messages import MOST_LEVELS
from resplit.gateway.openai.middleware import RequestIds, RequestLimits
from resplit.gateway.openai.prometheus import RequestMetrics
from resplit.gateway.openai.response_schemas import ResponseRequest
from resplit.gateway.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from resplit.gateway.openai.service import Caller, CompletionService
from resplit.gateway.openai.text import Text
from resplit.strict_json import StrictRoute

_METERED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def create_app(
    engine: TokenEngine,
    text: Text,
    model_name: str,
    limits: LimitsConfig,
    api_keys: Mapping[bytes, str],
    require_key: bool,
    metrics: RequestMetrics | None = None,
    outer: Sequence[Middleware] = (),
) -> FastAPI:
    """The application. `text` is the model's tokenizer; `api_keys` maps a key's digest to its class.

    The class of a request comes from its key, else from the header X-Resplit-Class, else it is the engine's default.
    Without `require_key` an unknown key has no effect. Other parts may add metrics of their own to `metrics`. Requests
    pass the middleware `outer` before the limits are checked, the first one first.
    Raises ConfigError if a key has a class that the engine does not have.
    """
    metrics = metrics or RequestMetrics()
    keys = ApiKeys.of(api_keys, engine.classes, require_key)
    checks = Middleware(RequestLimits, metrics=metrics, limits=limits, metered=_METERED, api_keys=keys)
    middleware = [Middleware(RequestIds), *outer, checks]  # the first one is outermost: also refusals get an id
    app = FastAPI(title="resplit", docs_url=None, redoc_url=None, middleware=middleware)
    app.state.service = CompletionService(engine, text, model_name, text.grammars())
    app.state.api_keys = keys
    app.state.max_deadline_s = limits.deadline
    app.state.metrics = metrics
    for kind in (HTTPException, RequestValidationError, ResplitError, TimeoutError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.include_router(_router)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return response(error)


def _service(request: Request) -> CompletionService:
    service: CompletionService = request.app.state.service
    return service


_Service = Annotated[CompletionService, Depends(_service)]


def _caller(
    request: Request,
    service: _Service,
    authorization: Annotated[str | None, Header()] = None,
    x_resplit_class: Annotated[str | None, Header()] = None,
    x_resplit_deadline_s: Annotated[float | None, Header(gt=0, allow_inf_nan=False)] = None,
) -> Caller:
    """The caller as the headers describe it; 401 if a key is required and missing, 400 for an unknown class."""
    state, engine = request.app.state, service.engine
    request_class = state.api_keys.class_of(authorization or "") or x_resplit_class or engine.default_class
    if request_class not in engine.classes:
        known = ", ".join(engine.classes)
        raise http_error(400, f"unknown request class; the classes are {known}", "invalid_value", "X-Resplit-Class")
    address = request.client.host if request.client else ""
    client = state.api_keys.client_of(authorization or "", address)
    return Caller(request_class, min(x_resplit_deadline_s or math.inf, state.max_deadline_s), client)


_Caller = Annotated[Caller, Depends(_caller)]


class _DeepRoute(StrictRoute):
    """Schemas of tools and answers are nested deeper than commands."""

    most_levels = MOST_LEVELS


_router = APIRouter(route_class=_DeepRoute)


@_router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request, service: _Service, caller: _Caller) -> Response:
    """Continue a prompt."""
    return await service.complete(body, caller, request.state.stopwatch)


@_router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, service: _Service, caller: _Caller) -> Response:
    """Answer a conversation."""
    return await service.chat(body, caller, request.state.stopwatch)


@_router.post("/v1/responses")
async def responses(body: ResponseRequest, request: Request, service: _Service, caller: _Caller) -> Response:
    """Answer a conversation in the newer form of the API, as far as it is about text."""
    return await service.respond(body, caller, request.state.stopwatch)


@_router.get("/v1/models")
@_router.get("/v1/models/", include_in_schema=False)
async def models(service: _Service, caller: _Caller) -> ModelList:
    """List the one model that is served."""
    return {"object": "list", "data": [service.model_card()]}


@_router.get("/v1/models/{name:path}")
async def model(name: str, service: _Service, caller: _Caller) -> ModelCard:
    """Describe the model of that name."""
    service.check_model(name)
    return service.model_card()


@_router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: _Service, caller: _Caller) -> TokenizedPrompt:
    """The token ids of a prompt or of a conversation."""
    ids = service.tokenize(body)
    return {"count": len(ids), "max_model_len": service.engine.context_tokens, "tokens": ids}


@_router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: _Service, caller: _Caller) -> DetokenizedPrompt:
    """The text of token ids, without special tokens."""
    return {"prompt": service.detokenize(body)}


@_router.get("/version")
async def version() -> dict[str, str]:
    """The version of resplit."""
    return {"version": metadata.version("resplit")}


@_router.get("/healthz")
@_router.head("/healthz", include_in_schema=False)
@_router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def healthz() -> dict[str, str]:
    """The process runs."""
    return {"status": "ok"}


@_router.get("/readyz")
@_router.head("/readyz", include_in_schema=False)
async def readyz(service: _Service) -> JSONResponse:
    """The engine can serve; otherwise 503 and the reason."""
    if reason := service.engine.ready():
        return JSONResponse({"status": "unready", "reason": reason}, 503, {"Retry-After": RETRY_AFTER_S})
    return JSONResponse({"status": "ok"})


@_router.get("/metrics")
async def exposition(request: Request) -> Response:
    """All metrics, for Prometheus."""
    metrics: RequestMetrics = request.app.state.metrics
    return Response(metrics.expose(), media_type=CONTENT_TYPE_LATEST)
