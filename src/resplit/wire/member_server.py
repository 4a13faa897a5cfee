"""A node's server: connections of members are served, and each member may have some of them.

A connection carries gRPC, or a stream of messages of one kind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from google.protobuf.message import Message
from grpclib.protocol import H2Protocol
from grpclib.server import Handler, Server

from resplit.security.identity import Member, certificate_name
from resplit.wire import message_limits
from resplit.wire.listener import ACCEPTED_PER_TURN, Listener
from resplit.wire.message_stream import MessageStream
from resplit.wire.paced_protocol import PacedProtocol
from resplit.wire.patience import Patience

# A node needs three connections, the controller four. Others may be left over from links that broke without a sign.
PER_MEMBER = 16
# Connections that may be open before they have proved to be a member's; TLS takes 64 KiB for each.
STRANGERS = 128


class _MemberConnection(Protocol):
    """A connection of a member."""

    transport: asyncio.Transport
    member: str


@dataclass(frozen=True)
class Streams:
    """Streams of messages of type `kind` and `most_bytes`. `serve` runs in a task that ends with its connection."""

    kind: type[Message]
    serve: Callable[[MessageStream[Any]], Awaitable[None]]
    most_bytes: int = message_limits.MAX_MESSAGE_BYTES


class MemberServer(Server):  # type: ignore[misc]  # grpclib has no types
    """A server whose listener hears which connections are a member's: those whose TLS handshake is complete.

    `services` serve the calls, and `streams` what other connections carry, by the protocol of their TLS handshake.
    `arriving` bounds what each member may leave half sent, over all its connections.
    """

    def __init__(
        self,
        services: Collection[Any],
        streams: Mapping[str, Streams],
        arriving: message_limits.Arriving,
        listener: Listener,
    ) -> None:
        super().__init__(services)
        self._served = streams
        self._arriving = arriving
        self._listener = listener
        self._open: defaultdict[str, list[_MemberConnection]] = defaultdict(list)  # by member, the oldest first
        self._patience: dict[str, Patience] = {}  # with the frames of each member
        self._streams: dict[MessageStream[Any], asyncio.Future[None]] = {}  # those that are open, and their tasks

    async def listen(self, member: Member) -> None:
        """Accept connections as this member."""
        await self.start(sock=self._listener, backlog=ACCEPTED_PER_TURN, ssl=member.server_context())

    def close(self) -> None:
        """Stop listening, and end the streams and the calls that are served."""
        for stream in list(self._streams):
            stream.abort()
        super().close()

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        # grpclib would keep the handler of a connection for ever if its handshake fails.
        self._handlers.discard(protocol.handler)
        return _MemberProtocol(protocol, self._begin_stream, self._begin_calls, self._end_calls)

    def _begin_stream(self, transport: asyncio.Transport) -> bool:
        """Serve the stream that a new connection carries; False if it carries calls."""
        streams = self._served.get(transport.get_extra_info("ssl_object").selected_alpn_protocol())
        if streams is None:
            return False
        stream = MessageStream(streams.kind, streams.most_bytes, self._arriving, self._end_stream)
        transport.set_protocol(stream)
        stream.connection_made(transport)
        self._streams[stream] = asyncio.ensure_future(streams.serve(stream))
        self._connected(stream)
        return True

    def _end_stream(self, stream: MessageStream[Any]) -> None:
        self._streams.pop(stream).cancel()
        self._disconnected(stream)

    def _begin_calls(self, connection: _MemberProtocol) -> None:
        self._handlers.add(connection.handler)
        connection.patience = self._patience.setdefault(connection.member, connection.patience)
        self._connected(connection)

    def _end_calls(self, connection: _MemberProtocol) -> None:
        """Let go of a connection with all that came over it. grpclib itself would do so after ten more connections."""
        self._disconnected(connection)
        for call in connection.handler._cancelled:
            call.add_done_callback(lambda _: self._forget(connection.handler))
        self._forget(connection.handler)

    def _connected(self, connection: _MemberConnection) -> None:
        self._listener.begin(connection.transport.get_extra_info("peername")[:2])
        of_member = self._open[connection.member]
        of_member.append(connection)
        if len(of_member) > PER_MEMBER:
            of_member.pop(0).transport.abort()

    def _disconnected(self, connection: _MemberConnection) -> None:
        with contextlib.suppress(ValueError):
            self._open[connection.member].remove(connection)

    def _forget(self, handler: Handler) -> None:
        if handler.check_closed():
            self._handlers.discard(handler)


class _MemberProtocol(PacedProtocol):
    """A copy of `protocol` that reports when its connection to a member is made, and when it is lost.

    `begin_stream` takes a connection that carries a stream, which this protocol then leaves alone.
    """

    member: str

    def __init__(
        self,
        protocol: H2Protocol,
        begin_stream: Callable[[asyncio.Transport], bool],
        on_connected: Callable[[_MemberProtocol], None],
        on_disconnected: Callable[[_MemberProtocol], None],
    ) -> None:
        super().__init__(protocol.handler, protocol.config, protocol.h2_config)
        self._begin_stream = begin_stream
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._begin_stream(cast(asyncio.Transport, transport)):
            return
        super().connection_made(transport)
        self.member = certificate_name(transport.get_extra_info("peercert"))
        self._on_connected(self)

    def connection_lost(self, error: BaseException | None) -> None:
        super().connection_lost(error)
        self._on_disconnected(self)
