"""The gRPC server of a node: connections of members are served, and each member may have some of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, cast

from grpclib.protocol import H2Protocol
from grpclib.server import Handler, Server

from resplit.security.identity import Member, certificate_name
from resplit.wire.listener import ACCEPTED_PER_TURN, Listener

# A member needs one connection. Others may be left over from links that broke without a sign.
PER_MEMBER = 16
# Connections that may be open before they have proved to be a member's; TLS takes 64 KiB for each.
STRANGERS = 128


class MemberServer(Server):  # type: ignore[misc]  # grpclib has no types
    """A server whose listener hears which connections are a member's: those whose TLS handshake is complete."""

    def __init__(self, services: Collection[Any], listener: Listener) -> None:
        super().__init__(services)
        self._listener = listener
        self._open: defaultdict[str, list[_MemberProtocol]] = defaultdict(list)  # by member, the oldest first

    async def listen(self, member: Member) -> None:
        """Accept connections as this member."""
        await self.start(sock=self._listener, backlog=ACCEPTED_PER_TURN, ssl=member.server_context())

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        # grpclib would keep the handler of a connection for ever if its handshake fails.
        self._handlers.discard(protocol.handler)
        return _MemberProtocol(protocol, self._connected, self._disconnected)

    def _connected(self, connection: _MemberProtocol) -> None:
        self._handlers.add(connection.handler)
        self._listener.begin(connection.transport.get_extra_info("peername")[:2])
        of_member = self._open[connection.member]
        of_member.append(connection)
        if len(of_member) > PER_MEMBER:
            of_member.pop(0).transport.abort()

    def _disconnected(self, connection: _MemberProtocol) -> None:
        """Let go of a connection with all that came over it. grpclib itself would do so after ten more connections."""
        with contextlib.suppress(ValueError):
            self._open[connection.member].remove(connection)
        for call in connection.handler._cancelled:
            call.add_done_callback(lambda _: self._forget(connection.handler))
        self._forget(connection.handler)

    def _forget(self, handler: Handler) -> None:
        if handler.check_closed():
            self._handlers.discard(handler)


class _MemberProtocol(H2Protocol):  # type: ignore[misc]  # grpclib has no types
    """A copy of `protocol` that reports when its connection to a member is made, and when it is lost."""

    transport: asyncio.Transport
    member: str

    def __init__(
        self,
        protocol: H2Protocol,
        on_connected: Callable[[_MemberProtocol], None],
        on_disconnected: Callable[[_MemberProtocol], None],
    ) -> None:
        super().__init__(protocol.handler, protocol.config, protocol.h2_config)
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, transport)
        self.member = certificate_name(transport.get_extra_info("peercert"))
        self._on_connected(self)

    def connection_lost(self, error: BaseException | None) -> None:
        super().connection_lost(error)
        self._on_disconnected(self)
