"""The gateway's HTTP server: when it asks for an API key, and how long it waits for a client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from resplit.cluster.local import free_ports
from resplit.cluster.server import _app, _http_server
from resplit.config import ClusterConfig
from resplit.model.source import StoredModel
from resplit.wire import listener
from resplit.wire.addresses import Address
from tests.support.in_process import InProcessCluster


@pytest.mark.parametrize(
    ("host", "api_keys", "open_to_all"),
    [
        ("127.0.0.1", [], True),
        ("::1", [], True),
        ("localhost", [], True),
        ("0.0.0.0", [], False),
        ("192.168.1.7", [], False),
        ("127.0.0.1", ["open-sesame"], False),
        ("0.0.0.0", ["open-sesame"], False),
    ],
)
async def test_api_keys_are_off_by_default_on_loopback_only(
    stored_model: StoredModel, tmp_path: Path, host: str, api_keys: list[str], open_to_all: bool
) -> None:
    config = ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alone",
            "trusted": ["alone"],
            "nodes": [{"name": "alone", "memory": "8 MiB"}],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8, "api_keys": api_keys}],
            "kv_tokens": 64,
        }
    )
    app = _app(config, stored_model, InProcessCluster(config, stored_model, tmp_path).sessions, Address(host, 8080))

    async def status(**headers: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return (await client.get("/v1/models", headers=headers)).status_code

    assert await status() == (200 if open_to_all else 401)
    assert await status(Authorization="Bearer guessed") == (200 if open_to_all else 401)
    for key in api_keys:
        assert await status(Authorization=f"Bearer {key}") == 200


IDLE_S = 0.5


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Address]:
    """A gateway whose application waits longer for an answer than a connection may be idle."""
    monkeypatch.setattr(listener, "IDLE_S", IDLE_S)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(2 * IDLE_S)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    address = Address("127.0.0.1", free_ports(1)[0])
    listening = listener.Listener(address, 16)
    server = _http_server(slow, listening)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    yield address
    server.should_exit = True
    await serving


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healt",
        b"GET /healthz HTTP/1.1\r\nHost: gate",
        b"POST /healthz HTTP/1.1\r\nHost: gateway\r\nContent-Length: 9\r\n\r\nhalf",  # a body that nobody reads
    ],
)
async def test_a_client_that_sends_half_a_request_is_disconnected(served: Address, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(served.host, served.port)
    writer.write(sent)

    async def trickle() -> None:
        with contextlib.suppress(OSError):
            while True:  # bytes that never complete a request do not prolong it
                await asyncio.sleep(0.05)
                writer.write(b"x")
                await writer.drain()

    trickling = asyncio.create_task(trickle() if sent else asyncio.sleep(0))
    async with asyncio.timeout(5):
        with contextlib.suppress(OSError):
            while await reader.read(1024):
                pass
    await trickling
    writer.close()


async def test_a_request_may_take_longer_than_a_connection_may_be_idle(served: Address) -> None:
    async with httpx.AsyncClient(base_url=f"http://{served}") as client:
        assert [(await client.get("/")).text for _ in range(2)] == ["ok", "ok"]
