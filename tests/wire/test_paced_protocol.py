"""A flood of frames is handled in many turns, and slowly; a peer that reads no answers is disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from grpclib.config import Configuration
from grpclib.server import Handler
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import PingAckReceived

from resplit.wire import paced_protocol
from resplit.wire.paced_protocol import PacedProtocol

PINGS = 3000


class Transport:
    """A transport that keeps what is written, and says that `unread` bytes of it are."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.unread = 0
        self.reading, self.aborted = True, False

    def get_extra_info(self, name: str) -> None: ...

    def write(self, content: bytes) -> None:
        self.written += content

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    close = abort


class Client:
    """The other end: it sends pings and counts their answers."""

    def __init__(self) -> None:
        self.transport = Transport()
        config = H2Configuration(client_side=False, header_encoding="ascii")
        settings = Configuration().__for_server__()
        self.protocol = PacedProtocol(Handler({}, cast(Any, None), cast(Any, None), cast(Any, None)), settings, config)
        self.protocol.connection_made(cast(Any, self.transport))
        self._connection = H2Connection(H2Configuration(header_encoding="ascii"))
        self._connection.initiate_connection()

    def ping(self) -> bytes:
        for number in range(PINGS):
            self._connection.ping(number.to_bytes(8, "big"))
        return self._connection.data_to_send()

    def answers(self) -> list[int]:
        events = self._connection.receive_data(bytes(self.transport.written))
        self.transport.written.clear()
        return [int.from_bytes(e.ping_data, "big") for e in events if isinstance(e, PingAckReceived)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the protocol goes on in the next turns of the event loop
            await asyncio.sleep(0)


async def test_a_flood_of_frames_is_handled_in_many_turns_and_nothing_is_read_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paced_protocol, "_TURN_S", 0.0)
    client = Client()
    client.protocol.data_received(client.ping())
    answered = client.answers()
    assert 0 < len(answered) < PINGS
    assert not client.transport.reading
    await until(lambda: client.transport.reading)
    assert answered + client.answers() == list(range(PINGS))


async def test_the_frames_of_one_member_take_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paced_protocol, "_AT_ONCE_S", 0.0)
    monkeypatch.setattr(paced_protocol, "_PER_S", 1e-9)
    first, second = Client(), Client()
    second.protocol.patience = first.protocol.patience  # two connections of one member
    for client in (first, second):
        client.protocol.data_received(client.ping())
    await asyncio.sleep(0.05)
    assert [client.transport.reading for client in (first, second)] == [False, False]
    assert first.protocol._received
    assert len(first.answers()) < PINGS
    first.protocol.connection_lost(None)
    second.protocol.connection_lost(None)
    assert not first.protocol._received


async def test_a_peer_that_reads_no_answers_is_disconnected() -> None:
    client = Client()
    client.transport.unread = paced_protocol._MOST_UNREAD_BYTES + 1
    client.protocol.data_received(client.ping())
    assert client.transport.aborted
