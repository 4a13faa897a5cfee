"""The HTTP application of `serve` from its first moment on. Until the gateway is made, it says what it waits for."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from resplit.errors import NodeLostError
from resplit.gateway.openai.http_errors import RETRY_AFTER_S, response
from resplit.gateway.openai.middleware import RequestIds


class Front:
    """Passes requests to `app` once it is set. Before that, probes and refusals say what the process is `doing`."""

    def __init__(self) -> None:
        self.doing = "the process starts"
        self.app: ASGIApp | None = None
        self._starting = RequestIds(self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.app or self._starting)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer_to(scope["path"])(scope, receive, send)

    def _answer_to(self, path: str) -> Response:
        if path in ("/healthz", "/health"):
            return JSONResponse({"status": "ok"})
        if path == "/readyz":
            return JSONResponse({"status": "unready", "reason": self.doing}, 503, {"Retry-After": RETRY_AFTER_S})
        return response(NodeLostError(self.doing))
