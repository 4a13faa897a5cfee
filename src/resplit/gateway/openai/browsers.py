"""ASGI middleware that refuses requests which the web page of another site has a browser send."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from resplit.gateway.openai.http_errors import http_error, response

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class BrowserRules:
    """Allows the `hosts` that a request may name in `Host` (None allows all), and the `origins` of other sites.

    A page can let its own name resolve to 127.0.0.1 (DNS rebinding); its requests then carry that name as host.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except HTTPException as error:
                await response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            rule = "this gateway answers to loopback names and to those in `http.hosts` of the cluster file"
            raise http_error(403, f"the host {host[:100]!r} is not allowed: {rule}", "host_not_allowed")
        for origin in map(str.lower, headers.getlist("origin")):
            if origin not in self._origins and origin.partition("://")[2] != host:
                rule = "other origins must be in `http.origins` of the cluster file"
                raise http_error(403, f"the origin {origin[:100]!r} is not allowed: {rule}", "origin_not_allowed")


def _name(host: str) -> str | None:
    """The name in a `Host` header, without its port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
