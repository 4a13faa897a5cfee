"""The gateway's HTTP server: when it asks for an API key, and how long it waits for a client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from resplit.cluster import server
from resplit.cluster.local import free_ports
from resplit.cluster.server import ServePaths, _app, _http_server, required_api_keys
from resplit.config import ClusterConfig
from resplit.errors import ConfigError
from resplit.model.source import StoredModel
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER
from resplit.wire import listener
from resplit.wire.addresses import Address
from tests.support.in_process import InProcessCluster


def _config(api_keys: list[str], **http: list[str]) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alone",
            "trusted": ["alone"],
            "nodes": [{"name": "alone", "memory": "8 MiB"}],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8, "api_keys": api_keys}],
            "kv_tokens": 64,
            "http": http,
        }
    )


async def _answer(app: ASGIApp, headers: dict[str, str], method: str = "GET") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8080") as client:
        return await client.request(method, "/v1/models", headers=headers)


@pytest.mark.parametrize(
    ("host", "api_keys", "open_to_all"),
    [
        ("127.0.0.1", [], True),
        ("::1", [], True),
        ("localhost", [], True),
        ("127.0.0.1", ["open-sesame"], False),
        ("0.0.0.0", ["open-sesame"], False),
    ],
)
async def test_api_keys_are_off_by_default_on_loopback_only(
    stored_model: StoredModel, tmp_path: Path, host: str, api_keys: list[str], open_to_all: bool
) -> None:
    config = _config(api_keys)
    sessions = InProcessCluster(config, stored_model, tmp_path).sessions
    app = _app(config, stored_model, sessions, required_api_keys(config, Address(host, 8080)))

    async def status(**headers: str) -> int:
        return (await _answer(app, headers)).status_code

    assert await status() == (200 if open_to_all else 401)
    assert await status(Authorization="Bearer guessed") == (200 if open_to_all else 401)
    for key in api_keys:
        assert await status(Authorization=f"Bearer {key}") == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::"])
def test_a_gateway_that_others_can_reach_needs_api_keys(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host}: other machines .* give a class .* `api_keys:"):
        required_api_keys(_config([]), Address(host, 8080))


@pytest.mark.parametrize(
    ("host", "status", "status_with_a_key"),
    [
        ("127.0.0.1:8080", 200, 200),
        ("localhost", 200, 200),
        ("LOCALHOST:1", 200, 200),
        ("[::1]:8080", 200, 200),
        ("models.example:8080", 200, 200),
        ("evil.example:8080", 403, 200),
        ("127.0.0.1.evil.example", 403, 200),
        ("localhost@evil.example", 403, 200),
        ("[::1", 403, 200),
        ("", 403, 200),
    ],
)
async def test_a_gateway_without_keys_answers_to_loopback_names_and_configured_ones_only(
    stored_model: StoredModel, tmp_path: Path, host: str, status: int, status_with_a_key: int
) -> None:
    open_config = _config([], hosts=["models.example"])
    sessions = InProcessCluster(open_config, stored_model, tmp_path).sessions
    without_keys = _app(open_config, stored_model, sessions, {})
    with_keys = _app(_config(["key"]), stored_model, sessions, _config(["key"]).classes_by_key())

    assert (await _answer(without_keys, {"Host": host})).status_code == status
    assert (await _answer(with_keys, {"Host": host, "Authorization": "Bearer key"})).status_code == status_with_a_key


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://app.example", True),
        ("http://127.0.0.1:8080", True),  # the gateway's own
        ("http://127.0.0.1:9000", False),
        ("http://app.example", False),
        ("https://app.example.evil.example", False),
        ("null", False),
    ],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_cross_origin_requests_are_refused_unless_their_origin_is_configured(
    stored_model: StoredModel, tmp_path: Path, method: str, origin: str, allowed: bool
) -> None:
    config = _config(["key"], origins=["https://app.example"])
    sessions = InProcessCluster(config, stored_model, tmp_path).sessions
    app = _app(config, stored_model, sessions, config.classes_by_key())
    headers = {"Origin": origin, "Authorization": "Bearer key"}
    if method == "OPTIONS":
        headers |= {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

    answer = await _answer(app, headers, method)

    assert answer.headers["x-request-id"]
    if not allowed:
        assert answer.status_code == 403
        assert origin in answer.json()["error"]["message"]
    elif origin == "https://app.example":
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert method == "OPTIONS" or "retry-after" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in answer.headers or origin == "https://app.example"


IDLE_S = 0.5


@contextlib.asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[Address]:
    """An HTTP server of this application."""
    address = Address("127.0.0.1", free_ports(1)[0])
    listening = listener.Listener(address, 16)
    listening.listen()  # so that clients can connect at once
    http = _http_server(app, listening)
    task = asyncio.create_task(http.serve(sockets=[listening]))
    yield address
    http.should_exit = True
    await task


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Address]:
    """A gateway whose application waits longer for an answer than a connection may be idle."""
    monkeypatch.setattr(listener, "IDLE_S", IDLE_S)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(2 * IDLE_S)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async with serving(slow) as address:
        yield address


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


async def test_a_client_that_does_not_take_its_answer_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "IDLE_S", IDLE_S)
    gone = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()  # the request, which is empty
        disconnect = asyncio.ensure_future(receive())
        while not disconnect.done():
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
            await asyncio.sleep(0)
        gone.set()

    async with serving(endless) as address:
        _, writer = await asyncio.open_connection(address.host, address.port, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n")
        async with asyncio.timeout(5):
            await gone.wait()
        writer.transport.abort()


async def test_a_client_that_takes_each_part_of_a_long_answer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "IDLE_S", 0.1)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(12):
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
            await asyncio.sleep(0.03)
        await send({"type": "http.response.body", "body": b""})

    async with serving(slow) as address, httpx.AsyncClient() as client:
        assert (await client.get(f"http://{address}/")).text == 12 * "part"


async def test_a_broken_chunk_is_answered_without_a_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async with serving(answers) as address:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: gate\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n")
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 400")
        writer.close()
        logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert [each for each in caplog.records if each.exc_info] == []


@pytest.mark.parametrize("head", [b"GET /", b"GET / HTTP/1.1\r\nHost: gateway\r\nX: "])
async def test_the_head_of_a_request_is_bounded(served: Address, head: bytes) -> None:
    reader, writer = await asyncio.open_connection(served.host, served.port)
    writer.write(head)
    async with asyncio.timeout(5):
        with contextlib.suppress(OSError):  # the server closes while the rest is under way
            for _ in range(64):
                writer.write(b"a" * 2**14)
                await writer.drain()
            assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.transport.abort()


@dataclass
class _Held:
    """Calls of a function that wait in their thread until they are released."""

    function: Callable[..., Any]
    released: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *arguments: Any) -> Any:
        assert self.released.wait(30)
        return self.function(*arguments)


async def test_the_port_answers_from_the_start_and_says_what_is_waited_for(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = _config([]).model_dump(exclude={"nodes", "classes", "limits", "http", "objective", "links"})
    nodes = [{"name": "alone", "memory": "8 MiB", "address": f"127.0.0.1:{free_ports(1)[0]}"}]
    content |= {"nodes": nodes, "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}]}
    keys_command(tmp_path / "keys", ["alone"])
    paths = ServePaths(
        tmp_path, tmp_path / "keys" / CONTROLLER, str(tmp_path / "registry"), Address("127.0.0.1", free_ports(1)[0])
    )
    obtain, package = _Held(lambda: stored_model), _Held(server.package)
    monkeypatch.setattr(server, "package", package)
    stop = asyncio.Event()

    serving = asyncio.create_task(server.serve(content, obtain, paths, stop, lambda: None))
    async with httpx.AsyncClient(base_url=f"http://{paths.listen}") as client:

        async def says(reason: str) -> None:
            said = None
            async with asyncio.timeout(120):  # the planner may compile its kernels
                while said != (503, reason):
                    assert not serving.done(), serving.result()
                    await asyncio.sleep(0.01)
                    with contextlib.suppress(httpx.TransportError):
                        answer = await client.get("/readyz")
                        said = (answer.status_code, answer.json()["reason"])
            assert (await client.get("/healthz")).status_code == 200
            refused = await client.get("/v1/models", headers={"x-request-id": "mine"})
            if reason.startswith("the model"):
                assert (refused.status_code, refused.json()["error"]["message"]) == (503, reason)
                assert (refused.headers["retry-after"], refused.headers["x-request-id"]) == ("2", "mine")
            command = await client.get("/control/status")
            assert (command.json()["error"]["message"], command.headers["retry-after"]) == (reason, "2")

        await says("the model is fetched and converted")
        obtain.released.set()
        await says("the model is packaged")
        package.released.set()
        await says("waiting for nodes: alone")
    stop.set()
    async with asyncio.timeout(20):  # and does not wait for the node
        await serving
