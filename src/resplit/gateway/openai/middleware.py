"""ASGI middleware around the API's requests: ids, keys, bounded bodies, clients that leave, a stopwatch."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from resplit.config import LimitsConfig
from resplit.gateway.openai.api_keys import ApiKeys
from resplit.gateway.openai.http_errors import response
from resplit.gateway.openai.prometheus import RequestMetrics, Stopwatch
from resplit.request_body import read_body

_LIMITED = ("/v1/", "/tokenize")  # other applications that are mounted on the app have their own rules
_ID_HEADER = "x-request-id"
_PLAIN_ID = re.compile(r"[\x21-\x7e]{1,128}")
_GRACE_S = 5.0  # beyond the deadline, for a client that does not read its answer


class RequestIds:
    """Answers every request with its `x-request-id`, or with a new one if it has none that is short and plain.

    It also answers a defect: Starlette would, but outside of all middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_ID_HEADER, "")
        request_id = given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex

        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception as error:
            if not begun:
                await response(error)(scope, receive, named)
            raise


class RequestLimits:
    """Checks the key, reads the whole body, then runs the app in a task, which it cancels if the client leaves.

    So a request stops waiting and generating as soon as its client disconnects. The app finds the request's
    `Stopwatch` in `request.state.stopwatch`; the metrics count requests of `metered` paths.
    """

    def __init__(
        self, app: ASGIApp, metrics: RequestMetrics, limits: LimitsConfig, metered: Collection[str], api_keys: ApiKeys
    ) -> None:
        self._app = app
        self._api_keys = api_keys
        self._metrics = metrics
        self._limits = limits
        self._metered = metered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_LIMITED):
            return await self._app(scope, receive, send)
        stopwatch = Stopwatch(self._metrics)
        scope.setdefault("state", {})["stopwatch"] = stopwatch
        try:
            await self._serve(scope, receive, send, stopwatch)
        except Exception:
            stopwatch.status = 500
            raise
        finally:
            if scope["path"] in self._metered:
                stopwatch.end()

    async def _serve(self, scope: Scope, receive: Receive, send: Send, stopwatch: Stopwatch) -> None:
        sender = _TimedSend(send, stopwatch)
        try:
            self._api_keys.class_of(Headers(scope=scope).get("authorization", ""))
            body = await read_body(scope, receive, int(self._limits.body), self._limits.deadline)
        except ClientDisconnect:
            return
        except HTTPException as error:
            await response(error)(scope, receive, sender)
            return
        app = asyncio.ensure_future(self._app(scope, _replay(body), sender))
        gone = asyncio.ensure_future(_disconnect(receive))
        try:
            # The app itself ends at its deadline, unless it waits for a client that does not read its answer.
            await asyncio.wait(
                {app, gone}, timeout=self._limits.deadline + _GRACE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if app.done() or sender.answered:
                await app
            else:
                stopwatch.leave()
        finally:
            app.cancel()
            gone.cancel()
            await asyncio.wait({app, gone})


class _TimedSend:
    """Forwards an answer, and records its status and whether it is complete."""

    def __init__(self, send: Send, stopwatch: Stopwatch) -> None:
        self._send = send
        self._stopwatch = stopwatch
        self.answered = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._stopwatch.status = message["status"]
        self.answered = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)


def _replay(body: bytes) -> Receive:
    unread = [body]

    async def receive() -> Message:
        if not unread:
            await asyncio.Future()  # never returns: a disconnect cancels the app
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    return receive


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
