"""Streamed answers: server-sent events, sent as tokens arrive, and comments while there is no token yet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from resplit.gateway.openai.bodies import ErrorObject, Event
from resplit.gateway.openai.completion import TextPiece
from resplit.gateway.openai.http_errors import as_http, error_object
from resplit.gateway.openai.prometheus import Stopwatch
from resplit.process.cancellation import cancel_and_wait

_log = structlog.get_logger(__name__)
# Proxies close connections on which nothing comes; most wait for 15 s or longer.
PING_EVERY_S = 5.0
_PING = b": ping\n\n"

Indexed = tuple[int, TextPiece]


class AnswerForm(Protocol):
    """The events of one endpoint. Each has a name if it has a `type`."""

    @property
    def key(self) -> str:
        """The answer's name in the log."""

    @property
    def ends_with_done(self) -> bool:
        """Whether `[DONE]` follows the last event."""

    def opening(self, choices: int) -> Sequence[Event]:
        """The events before the first token."""

    def chunk(self, index: int, piece: TextPiece) -> Sequence[Event]:
        """The events of one piece of a choice."""

    def closing(self, new_tokens: int) -> Sequence[Event]:
        """The events after the last token."""

    def failure(self, error: ErrorObject) -> Event:
        """The event of an error object, after which no other comes."""


class EventStream(Response):
    """Server-sent events, sent by the task that runs the request. Cancelling the task also closes the generation.

    `first` is the task that waits for the first piece, from which `events` begin.
    """

    media_type = "text/event-stream"

    def __init__(self, first: asyncio.Task[Indexed], events: AsyncGenerator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not self._first.done():
                await send({"type": "http.response.body", "body": _PING, "more_body": True})
                await asyncio.wait({self._first}, timeout=PING_EVERY_S)
            async with aclosing(self._events) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await cancel_and_wait([self._first])


async def begun(pieces: AsyncGenerator[Indexed]) -> asyncio.Task[Indexed]:
    """Wait for the first piece, but no longer than until the first comment is due.

    An error that comes meanwhile is raised: it becomes a status. A later one can only become an event of the stream.
    """
    first = asyncio.create_task(_next(pieces))
    try:
        await asyncio.wait({first}, timeout=PING_EVERY_S)
    except BaseException:
        await cancel_and_wait([first])
        raise
    if first.done():
        first.result()
    return first


async def _next(pieces: AsyncGenerator[Indexed]) -> Indexed:
    return await anext(pieces)


async def event_data(
    first: asyncio.Task[Indexed],
    rest: AsyncGenerator[Indexed],
    form: AnswerForm,
    choices: int,
    stopwatch: Stopwatch,
) -> AsyncGenerator[str]:
    """The events of one answer. An error becomes the last event, because the status is already sent."""
    made, open_choices = 0, choices
    async with aclosing(rest):
        try:
            (index, piece) = await first
            for event in form.opening(choices):
                yield _event(event)
            while True:
                made += len(piece.token_ids)
                for event in form.chunk(index, piece):
                    yield _event(event)
                open_choices -= piece.finish is not None
                if not open_choices:
                    break
                index, piece = await anext(rest)
            for event in form.closing(made):
                yield _event(event)
            if form.ends_with_done:
                yield "data: [DONE]\n\n"
        except Exception as error:
            answer = as_http(error)
            stopwatch.status = answer.status_code
            if answer.status_code == 500:
                _log.exception("a stream failed", answer=form.key)
            yield _event(form.failure(error_object(answer)))


def _event(event: Event) -> str:
    kind = event.get("type")
    name = f"event: {kind}\n" if kind else ""
    return f"{name}data: {json.dumps(event)}\n\n"
