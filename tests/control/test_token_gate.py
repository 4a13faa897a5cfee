"""The control API reads no body without the token, and no more of one than its limit."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.types import Message, Receive, Scope, Send

from resplit import request_body
from resplit.control import token_gate
from resplit.control.token_gate import TokenGate

TOKEN = (b"authorization", b"Bearer secret")
LIMIT_BYTES = 1000


class Exchange:
    """One request through the gate: the parts that it read, what the application got, and the status."""

    def __init__(self, *parts: bytes, ends: bool = True) -> None:
        self.parts, self.ends = list(parts), ends
        self.read = 0
        self.body: bytes | None = None
        self.status = 0
        self.answer = b""

    async def run(self, *headers: tuple[bytes, bytes]) -> Exchange:
        scope = {"type": "http", "method": "POST", "path": "/problem", "headers": list(headers)}
        await TokenGate(self._app, "secret")(scope, self._receive, self._send)
        return self

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def _receive(self) -> Message:
        self.read += 1
        if not self.parts:
            await asyncio.Future()
        body = self.parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self.parts) or not self.ends}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.answer += message["body"]


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_gate, "BODY_BYTES", LIMIT_BYTES)
    monkeypatch.setattr(request_body, "PAUSE_S", 0.1)


@pytest.mark.parametrize("headers", [[], [(b"authorization", b"Bearer guessed")], [(b"authorization", b"\xff")]])
async def test_without_the_token_no_part_of_a_body_is_read(headers: list[tuple[bytes, bytes]]) -> None:
    exchange = await Exchange(b"x" * 10).run(*headers)
    assert (exchange.status, exchange.read, exchange.body) == (401, 0, None)


async def test_a_body_that_is_announced_as_too_large_is_not_read() -> None:
    exchange = await Exchange(b"x" * 10).run(TOKEN, (b"content-length", b"1001"))
    assert (exchange.status, exchange.read, exchange.body) == (413, 0, None)


async def test_a_body_is_read_up_to_its_limit_only() -> None:
    exchange = await Exchange(*[b"x" * 400] * 10).run(TOKEN)
    assert (exchange.status, exchange.read, exchange.body) == (413, 3, None)


async def test_a_body_that_stops_arriving_is_refused() -> None:
    exchange = await Exchange(b"half", ends=False).run(TOKEN)
    assert (exchange.status, exchange.body) == (408, None)


async def test_a_body_at_the_limit_reaches_the_application_whole() -> None:
    exchange = await Exchange(b"x" * 400, b"y" * 600).run(TOKEN, (b"content-length", b"1000"))
    assert (exchange.status, exchange.body) == (200, b"x" * 400 + b"y" * 600)


async def test_a_refusal_says_what_is_needed() -> None:
    exchange = await Exchange().run()
    message = "the control API needs the token in the state folder"
    assert json.loads(exchange.answer) == {"error": {"message": message, "type": "RequestRefusedError"}}


async def test_after_the_whole_body_the_application_hears_that_the_client_left() -> None:
    sent: list[Message] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
        {"type": "http.disconnect"},
    ]
    heard: list[Message] = []

    async def receive() -> Message:
        return sent.pop(0)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([await receive(), await receive()])

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/problem", "headers": [TOKEN]}
    await TokenGate(application, "secret")(scope, receive, send)
    assert heard == [{"type": "http.request", "body": b"ab", "more_body": False}, {"type": "http.disconnect"}]
