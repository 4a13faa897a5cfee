"""A node's port and strangers: who does not become a member is disconnected, and members are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpclib.server import Handler

from resplit.model.source import StoredModel
from resplit.security.identity import Member
from resplit.wire import listener, member_server
from tests.support.in_process import InProcessCluster, in_process
from tests.support.two_nodes import two_node_config

WITHIN_S = 10.0
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the begin of a handshake


@pytest.fixture
async def nodes(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[InProcessCluster]:
    monkeypatch.setattr(listener, "IDLE_S", 0.5)
    async with in_process(two_node_config(), stored_model, tmp_path) as running:
        yield running


async def until_closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(WITHIN_S):
        with contextlib.suppress(OSError, ssl.SSLError):
            while await reader.read(65536):
                pass


@pytest.mark.parametrize("sent", [b"", CLIENT_HELLO, b"GET / HTTP/1.1\r\n"])
async def test_a_handshake_that_never_ends_is_closed(nodes: InProcessCluster, sent: bytes) -> None:
    address = nodes.addresses["plain"]
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(sent)

    await until_closed(reader)

    assert (await nodes.peer("plain").echo(0)).round_trip_s > 0
    writer.close()


async def test_a_client_without_a_certificate_is_closed(nodes: InProcessCluster) -> None:
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.load_verify_locations(nodes.folder / "keys" / "plain" / "ca.pem")
    anonymous.set_alpn_protocols(["h2"])
    address = nodes.addresses["plain"]
    # In TLS 1.3 the client's handshake ends before the server has checked its certificate.
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=anonymous, server_hostname="plain")

    await until_closed(reader)
    writer.close()


async def test_a_member_with_many_connections_loses_its_oldest_ones_only(nodes: InProcessCluster) -> None:
    context = Member.load(nodes.folder / "keys" / "trusted").client_context()
    address = nodes.addresses["plain"]
    opened = [
        await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname="plain")
        for _ in range(member_server.PER_MEMBER + 3)
    ]

    for reader, _ in opened[:3]:
        await until_closed(reader)

    await asyncio.sleep(2 * listener.IDLE_S)  # the others are not idle: a member is there
    assert not any(reader.at_eof() for reader, _ in opened[4:])
    assert (await nodes.peer("plain").echo(0)).round_trip_s > 0
    for _, writer in opened:
        writer.close()


async def test_a_failed_handshake_leaves_nothing_behind(nodes: InProcessCluster) -> None:
    address = nodes.addresses["plain"]
    before = handlers()
    for _ in range(50):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await until_closed(reader)
        writer.close()

    assert handlers() - before < 10


def handlers() -> int:
    """The connection handlers that are alive in this process."""
    gc.collect()
    return sum(isinstance(each, Handler) for each in gc.get_objects())


async def test_members_are_served_beside_many_idle_connections(nodes: InProcessCluster) -> None:
    address = nodes.addresses["plain"]
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(600):  # more than the limit
            _, writer = await asyncio.open_connection(address.host, address.port)
            stack.callback(writer.close)
        context = Member.load(nodes.folder / "keys" / "trusted").client_context()
        _, member = await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname="plain")
        member.close()

        assert (await nodes.peer("plain").echo(0)).round_trip_s > 0
    assert nodes.router.listening == {"trusted", "plain"}
