"""Streamed answers: server-sent events, sent as tokens arrive."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from resplit.gateway.openai.completion import Envelope, Piece
from resplit.gateway.openai.http_errors import as_http, body_of
from resplit.gateway.openai.metrics import Stopwatch

_log = structlog.get_logger(__name__)


class EventStream(Response):
    """Server-sent events, sent by the task that runs the request. Cancelling the task also closes the generation."""

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


async def event_data(
    first: Piece, rest: AsyncGenerator[Piece], envelope: Envelope, include_usage: bool, stopwatch: Stopwatch
) -> AsyncGenerator[str]:
    """The data of the events of one answer. An error becomes the last event, because the status is already sent."""
    no_usage = {"usage": None} if include_usage else {}
    piece, count = first, 1
    async with aclosing(rest):
        try:
            for chunk in envelope.opening():
                yield json.dumps(chunk | no_usage)
            while True:
                for chunk in envelope.chunk(piece):
                    yield json.dumps(chunk | no_usage)
                if piece.finish:
                    break
                piece, count = await anext(rest), count + 1
            if include_usage:
                yield json.dumps(envelope.usage_chunk(count))
            yield "[DONE]"
        except Exception as error:
            answer = as_http(error)
            stopwatch.status = answer.status_code
            if answer.status_code == 500:
                _log.exception("a stream failed", answer=envelope.key)
            yield body_of(answer)
