"""Connections at a listening port: idle ones end or make way, served ones stay, and too many are refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from structlog.testing import capture_logs

from resplit.cluster.local import free_ports
from resplit.errors import ConfigError
from resplit.wire import listener as module
from resplit.wire.addresses import Address
from resplit.wire.listener import ACCEPTED_PER_TURN, Listener

WITHIN_S = 5.0


class Greeter(asyncio.Protocol):
    """Says hello to each connection, and `begin`s and `end`s as the client sends it."""

    listener: Listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.peer = transport.get_extra_info("peername")
        self.transport = transport
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello\n")

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.transport, asyncio.Transport)
        for word in data.decode().split():
            getattr(self.listener, word)(self.peer)
            self.transport.write(b"done\n")


class Client:
    """One connection to a listener."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def line(self) -> bytes:
        """What the server says next; empty if it closed the connection."""
        async with asyncio.timeout(WITHIN_S):
            try:
                return await self.reader.readline()
            except ConnectionResetError:
                return b""

    async def say(self, word: str) -> None:
        self.writer.write(f"{word}\n".encode())
        assert await self.line() == b"done\n"


class Port:
    """A listener with this limit, and its clients."""

    def __init__(self, limit: int) -> None:
        self.address = Address("127.0.0.1", free_ports(1)[0])
        self.listener = Listener(self.address, limit)
        self.clients: list[Client] = []

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Port]:
        factory = type("Factory", (Greeter,), {"listener": self.listener})
        loop = asyncio.get_running_loop()
        server = await loop.create_server(factory, sock=self.listener, backlog=ACCEPTED_PER_TURN)
        try:
            yield self
        finally:
            for client in self.clients:
                client.writer.transport.abort()
            server.close()

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection(self.address.host, self.address.port))
        self.clients.append(client)
        return client

    async def greeted(self) -> Client:
        client = await self.connect()
        assert await client.line() == b"hello\n"
        return client


async def test_an_idle_connection_is_closed_and_a_served_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.1)
    async with Port(limit=8).open() as port:
        served = await port.greeted()
        await served.say("begin")
        idle = await port.greeted()

        assert await idle.line() == b""
        await served.say("begin")  # a second request begins before the first one ends
        await served.say("end")
        assert await (await port.greeted()).line() == b""  # so that more than `IDLE_S` has passed
        await served.say("end")
        assert await served.line() == b""


async def test_each_connection_beyond_half_the_limit_ends_the_oldest_idle_one() -> None:
    async with Port(limit=8).open() as port:
        served = await port.greeted()
        await served.say("begin")
        strangers = [await port.greeted() for _ in range(50)]

        for closed in strangers[:-4]:
            assert await closed.line() == b""
        for alive in [served, *strangers[-4:]]:
            await alive.say("begin")


async def test_a_connection_is_refused_only_if_all_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CLOSING", 0)
    async with Port(limit=4).open() as port:
        served = []
        for _ in range(4):
            served.append(await port.greeted())
            await served[-1].say("begin")

        with capture_logs() as logs:
            assert [await (await port.connect()).line() for _ in range(3)] == [b"", b"", b""]
        assert [line["event"] for line in logs] == ["connections are refused"]  # one line, not one for each

        await served[0].say("end")
        served[0].writer.close()
        await served[0].line()
        await port.greeted()


async def test_without_a_descriptor_a_connection_is_refused_and_later_ones_are_served() -> None:
    loop = asyncio.get_running_loop()
    async with Port(limit=64).open() as port:
        before = await port.greeted()
        with socket.socket() as refused:
            refused.setblocking(False)
            with capture_logs() as logs, no_descriptor_left():
                async with asyncio.timeout(WITHIN_S):
                    await loop.sock_connect(refused, (port.address.host, port.address.port))
                    with contextlib.suppress(ConnectionResetError):
                        assert await loop.sock_recv(refused, 1) == b""
                await before.say("begin")
        assert [line["reason"] for line in logs] == ["the process has no file descriptor left"]
        await port.greeted()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """A context in which this process can open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 32, hard))
    opened: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_port_in_use_and_an_unknown_host_are_refused_in_words() -> None:
    port = Port(limit=4)
    with contextlib.closing(port.listener):
        port.listener.listen()
        with pytest.raises(ConfigError, match=f"{port.address}.*in use"):
            Listener(port.address, 4)
    with pytest.raises(ConfigError, match="cannot listen there"):
        Listener(Address("no-such-host.invalid", 1), 4)


def test_at_most_half_of_the_descriptors_are_for_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 2 * (len(os.listdir("/proc/self/fd")) + 50)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with contextlib.closing(Port(limit=limit).listener) as listener:
            assert listener.limit == limit // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_small_messages_are_sent_at_once() -> None:
    accepted = asyncio.get_running_loop().create_future()

    class Accepting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.set_result(transport.get_extra_info("socket"))

    listener = Listener(Address("127.0.0.1", 0), limit=4)
    server = await asyncio.get_running_loop().create_server(Accepting, sock=listener)
    _, writer = await asyncio.open_connection(*listener.getsockname())
    async with asyncio.timeout(WITHIN_S):
        connection = await accepted
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    server.close()
