"""The routes of the live page: its files, and its stream of events. Reading is public where `/v1` is.

The page itself holds no facts. What changes anything goes to the control API, with its token.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from resplit.gateway.openai.api_keys import ApiKeys
from resplit.live.streams import PageStreams

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, and no page of another site around this one.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_files() -> dict[str, bytes]:
    """The files of the page, by name."""
    folder = files("resplit.live").joinpath("static")
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name.rpartition(".")[2] in _TYPES}


def live_routes(streams: PageStreams, may_read: Callable[[str], None]) -> APIRouter:
    """The routes `/` and `/live/...`. `may_read` raises HTTPException for an Authorization header that is no good."""
    router, content = APIRouter(include_in_schema=False), page_files()

    @router.get("/")
    async def page() -> Response:
        return _file("index.html", content["index.html"])

    @router.get("/live/events")
    async def events(authorization: Annotated[str, Header()] = "") -> StreamingResponse:
        may_read(authorization)
        streams.check_room()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(streams.events(), media_type="text/event-stream", headers=headers)

    @router.get("/live/{name}")
    async def file(name: str) -> Response:
        if name not in content:
            raise HTTPException(404, f"the page has no file {name[:100]!r}")
        return _file(name, content[name])

    return router


def reader_check(api_keys: ApiKeys, token: str) -> Callable[[str], None]:
    """Who may read: whoever may use the model, and whoever has the control API's token."""
    expected = f"Bearer {token}".encode()

    def check(authorization: str) -> None:
        if not hmac.compare_digest(authorization.encode(), expected):
            api_keys.class_of(authorization)

    return check


def _file(name: str, content: bytes) -> Response:
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)
