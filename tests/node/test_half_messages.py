"""A member that begins messages and does not end them: what a node holds of them is bounded, and freed with them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpclib.protocol import Stream
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamReset, TrailersReceived

from resplit.model.source import StoredModel
from resplit.security.identity import Member
from resplit.wire import message_limits
from tests.support.in_process import InProcessCluster, in_process, until
from tests.support.two_nodes import two_node_config

MESSAGE_BYTES = 4 * 2**20
STREAMS = 16


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    async with in_process(two_node_config(), stored_model, tmp_path) as running:
        yield running


class HalfMessages:
    """A connection of the member `trusted` to `plain` with `STREAMS` messages, each sent but for its last byte."""

    def __init__(self, nodes: InProcessCluster) -> None:
        self._nodes = nodes
        self._h2 = H2Connection(H2Configuration(header_encoding="ascii"))
        self._left = {1 + 2 * number: MESSAGE_BYTES - 1 for number in range(STREAMS)}

    async def connect(self) -> HalfMessages:
        """Open the connection, and announce the messages."""
        # Not through the proxy, which would end the connection politely, and so later.
        address, keys = self._nodes.inside["plain"], self._nodes.folder / "keys" / "trusted"
        context = Member.load(keys).client_context()
        self._reader, self._writer = await asyncio.open_connection(
            address.host, address.port, ssl=context, server_hostname="plain"
        )
        self._h2.initiate_connection()
        for stream in self._left:
            headers = [(":method", "POST"), (":scheme", "https"), (":path", "/resplit.wire.Node/Command")]
            headers += [(":authority", "plain"), ("te", "trailers"), ("content-type", "application/grpc")]
            self._h2.send_headers(stream, headers)
            self._h2.send_data(stream, struct.pack(">?I", False, MESSAGE_BYTES))
        return self

    async def send(self, quiet_s: float) -> None:
        """Send as much as the node takes, until it takes nothing for `quiet_s`."""
        with contextlib.suppress(TimeoutError):
            while any(self._left.values()):
                self._fill_windows()
                self._writer.write(self._h2.data_to_send())
                async with asyncio.timeout(quiet_s):
                    events = self._h2.receive_data(await self._reader.read(65536))
                for refused in events:
                    if isinstance(refused, TrailersReceived | StreamReset):
                        self._left.pop(refused.stream_id, None)

    @property
    def kept(self) -> int:
        """The messages that the node has not refused."""
        return len(self._left)

    def close(self) -> None:
        self._writer.transport.abort()

    def _fill_windows(self) -> None:
        for stream, left in self._left.items():
            while left and (size := min(left, self._h2.local_flow_control_window(stream), 2**14)):
                self._h2.send_data(stream, bytes(size))
                left -= size
            self._left[stream] = left


async def test_a_node_holds_a_bounded_size_of_messages_that_do_not_end(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_limits, "MAX_MESSAGE_BYTES", 2 * MESSAGE_BYTES)
    attack = await HalfMessages(nodes).connect()

    await attack.send(quiet_s=0.5)

    assert attack.kept == 2
    assert (await nodes.peer("plain").echo(2**19)).round_trip_s > 0, "other members are not held up"
    attack.close()


async def test_what_a_connection_had_sent_is_freed_when_it_ends(nodes: InProcessCluster) -> None:
    before = open_streams()
    attack = await HalfMessages(nodes).connect()
    await attack.send(quiet_s=0.2)
    assert open_streams() >= before + STREAMS

    attack.close()

    async def freed() -> bool:
        return open_streams() <= before

    await until(freed, 30.0)


def open_streams() -> int:
    """The streams of HTTP/2 that this process keeps, with what came on them."""
    gc.collect()
    return sum(type(each) is Stream for each in gc.get_objects())
