"""A TLS connection carries what several threads write, whole and in order, and ends as one of asyncio does."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import socket
import ssl
import struct
import termios
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from resplit.security.authority import keys_command
from resplit.security.identity import STEPS, Member, certificate_name
from resplit.wire import tls_connection
from resplit.wire.tls_connection import TlsConnection
from tests.support.in_process import until

_THREADS, _WRITES, _WRITE_BYTES = 4, 300, 5000


class Kept(asyncio.BufferedProtocol):
    """A protocol that keeps what arrives."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.content = bytearray()
        self.has_ended = False
        self._room = memoryview(bytearray(777))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        self.content += self._room[:nbytes]

    def connection_lost(self, error: Exception | None) -> None:
        self.has_ended = True


@dataclass
class Ends:
    """The protocol of a node's connections, and how to make one to it."""

    port: int
    node: Kept
    folder: Path

    async def connected(self, to: str = "beta", protocol: Kept | None = None) -> Kept:
        here = protocol or Kept()
        context = Member.load(self.folder / "alpha").client_context(STEPS)
        connection = TlsConnection(context, lambda: here, to)
        await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", self.port)
        await connection.shaken
        return here


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[Ends]:
    keys_command(tmp_path, ["alpha", "beta"])
    node, context = Kept(), Member.load(tmp_path / "beta").server_context()
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: TlsConnection(context, lambda: node), "127.0.0.1", 0) as server:
        yield Ends(server.sockets[0].getsockname()[1], node, tmp_path)


def waiting_bytes(descriptor: int) -> int:
    """The bytes that arrived at a socket and were not read."""
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0])


def plain_socket(end: Kept) -> socket.socket:
    """Another descriptor of an end's connection, below TLS."""
    return socket.socket(fileno=os.dup(end.transport.get_extra_info("socket").fileno()))


async def wait_for(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await until(holds)


async def test_both_ends_prove_who_they_are_and_agree_what_the_connection_carries(ends: Ends) -> None:
    here = await ends.connected()
    here.transport.write(b"from alpha")
    await wait_for(lambda: bytes(ends.node.content) == b"from alpha")
    ends.node.transport.write(b"from beta")
    await wait_for(lambda: bytes(here.content) == b"from beta")
    assert certificate_name(here.transport.get_extra_info("peercert")) == "beta"
    assert certificate_name(ends.node.transport.get_extra_info("peercert")) == "alpha"
    assert ends.node.transport.get_extra_info("ssl_object").selected_alpn_protocol() == STEPS
    here.transport.abort()
    await wait_for(lambda: ends.node.has_ended and here.has_ended)


async def test_writes_of_several_threads_arrive_whole_and_in_order_though_the_other_end_reads_late(ends: Ends) -> None:
    here = await ends.connected()
    await wait_for(lambda: hasattr(ends.node, "transport"))
    ends.node.transport.pause_reading()

    def write(thread: int) -> None:
        for number in range(_WRITES):
            here.transport.write(bytes([thread, number % 256]) * (_WRITE_BYTES // 2))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, _THREADS)]
    for each in threads:
        each.start()
    write(0)
    for each in threads:
        await asyncio.to_thread(each.join)
    ends.node.transport.resume_reading()
    await wait_for(lambda: len(ends.node.content) == _THREADS * _WRITES * _WRITE_BYTES)
    writes = [
        bytes(ends.node.content[first : first + _WRITE_BYTES])
        for first in range(0, len(ends.node.content), _WRITE_BYTES)
    ]
    for thread in range(_THREADS):
        of_thread = [each for each in writes if each[0] == thread]
        assert of_thread == [bytes([thread, number % 256]) * (_WRITE_BYTES // 2) for number in range(_WRITES)]
    here.transport.abort()


async def test_a_thread_sends_while_the_event_loop_is_busy(ends: Ends) -> None:
    here = await ends.connected()
    await wait_for(lambda: hasattr(ends.node, "transport"))
    ends.node.transport.pause_reading()
    sent = threading.Event()

    def write() -> None:
        here.transport.write(b"now")
        sent.set()

    threading.Thread(target=write).start()
    assert sent.wait(10)  # holds up the event loop
    assert waiting_bytes(ends.node.transport.get_extra_info("socket").fileno()) > len(b"now")
    ends.node.transport.resume_reading()
    await wait_for(lambda: bytes(ends.node.content) == b"now")
    here.transport.abort()


async def test_an_end_that_proves_another_name_is_refused(ends: Ends) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="gamma"):
        await ends.connected(to="gamma")
    assert not hasattr(ends.node, "transport"), "there was a handshake"


async def test_a_handshake_that_does_not_go_on_ends(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_connection, "_HANDSHAKE_WITHIN_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", ends.port)
    writer.write(b"\x16\x03\x01")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def test_nothing_is_left_of_a_connection_that_was_refused(ends: Ends) -> None:
    async def refused() -> weakref.ref[TlsConnection]:
        context = Member.load(ends.folder / "alpha").client_context(STEPS)
        connection = TlsConnection(context, Kept, "beta")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", 1)
        return weakref.ref(connection)

    connection = await asyncio.create_task(refused())
    gc.collect()
    assert connection() is None  # it had a timer that ended it a minute later, and failed


async def test_bytes_that_are_no_tls_end_the_connection(ends: Ends) -> None:
    here = await ends.connected()
    with plain_socket(here) as plain:
        plain.send(b"no record of TLS at all")
    await wait_for(lambda: ends.node.has_ended)


async def test_connections_of_two_event_loops_do_not_share_the_room_for_what_arrives(ends: Ends) -> None:
    context = Member.load(ends.folder / "alpha").client_context(STEPS)

    def room_of_another_loop() -> memoryview:
        async def room() -> memoryview:
            return TlsConnection(context, Kept, "beta").get_buffer(-1)

        return asyncio.run(room())

    here = TlsConnection(context, Kept, "beta").get_buffer(-1)
    assert TlsConnection(context, Kept, "beta").get_buffer(-1) is here
    there = await asyncio.to_thread(room_of_another_loop)
    there[:4] = b"also"
    assert here[:4] != there[:4]
