"""The gRPC server of a node: connections of members are served, and each member may have some of them."""

from __future__ import annotations

import asyncio
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
        self._transports: defaultdict[str, list[asyncio.Transport]] = defaultdict(list)  # by member, the oldest first

    async def listen(self, member: Member) -> None:
        """Accept connections as this member."""
        await self.start(sock=self._listener, backlog=ACCEPTED_PER_TURN, ssl=member.server_context())

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        # grpclib would keep the handler of a connection for ever if its handshake fails.
        self._handlers.discard(protocol.handler)
        return _MemberProtocol(self._connected, protocol)

    def _connected(self, handler: Handler, transport: asyncio.Transport) -> None:
        self._handlers.add(handler)
        self._listener.begin(transport.get_extra_info("peername")[:2])
        member = certificate_name(transport.get_extra_info("peercert"))
        still_open = [each for each in self._transports[member] if not each.is_closing()]
        if len(still_open) >= PER_MEMBER:
            still_open.pop(0).abort()
        self._transports[member] = [*still_open, transport]


class _MemberProtocol(H2Protocol):  # type: ignore[misc]  # grpclib has no types
    """A copy of `protocol` that reports when its connection is made."""

    def __init__(self, on_connected: Callable[[Handler, asyncio.Transport], None], protocol: H2Protocol) -> None:
        super().__init__(protocol.handler, protocol.config, protocol.h2_config)
        self._on_connected = on_connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._on_connected(self.handler, cast(asyncio.Transport, transport))
