"""ASGI middleware before the control API: the token is checked before a body is read, and bodies are bounded."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resplit.request_body import read_body

BODY_BYTES = 16 * 2**20  # the largest bodies are placement problems
_BODY_S = 30.0


class TokenGate:
    """Passes on requests with the bearer token, with their whole body."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check_token(Headers(scope=scope))
                body = await read_body(scope, receive, BODY_BYTES, _BODY_S)
            except ClientDisconnect:
                return
            except HTTPException as error:
                await _refusal(error)(scope, receive, send)
                return
            receive = _replay(body, receive)
        await self._app(scope, receive, send)

    def _check_token(self, headers: Headers) -> None:
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._expected):
            raise HTTPException(401, "the control API needs the token in the state folder")


def _refusal(error: HTTPException) -> JSONResponse:
    content = {"error": {"message": error.detail, "type": "RequestRefusedError"}}
    return JSONResponse(content, error.status_code)


def _replay(body: bytes, receive: Receive) -> Receive:
    unread = [body]

    async def replayed() -> Message:
        return {"type": "http.request", "body": unread.pop(), "more_body": False} if unread else await receive()

    return replayed
