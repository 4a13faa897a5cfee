"""Reads the body of an HTTP request, up to a size and within a time."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

PAUSE_S = 10.0  # a client that sends nothing for so long is not heard any more


async def read_body(scope: Scope, receive: Receive, limit_bytes: int, limit_s: float) -> bytes:
    """The whole body, of at most `limit_bytes`, that arrives within `limit_s` and without a pause of `PAUSE_S`.

    HTTPException with status 413, before a byte is read if the client announced the size, or 408. ClientDisconnect if
    the client leaves. uvicorn drops the rest of the body once the request is answered. To close the connection at once
    would reset it, and the client might not see the answer.
    """
    body = bytearray()
    # The HTTP server has refused a length that is not a number.
    announced_bytes = int(Headers(scope=scope).get("content-length") or 0)
    try:
        async with asyncio.timeout(limit_s):
            while max(announced_bytes, len(body)) <= limit_bytes:
                message = await _next(receive)
                if message["type"] != "http.request":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if not message.get("more_body") and len(body) <= limit_bytes:
                    return bytes(body)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {limit_s:g} s, or paused for {PAUSE_S:g} s") from None
    raise HTTPException(413, f"the body is larger than {limit_bytes} bytes")


async def _next(receive: Receive) -> Message:
    async with asyncio.timeout(PAUSE_S):
        return await receive()
