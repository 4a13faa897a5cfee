"""Limits on incoming messages: their size, and their form. And on the time to connect.

grpclib itself reads as many bytes as the other side announces, up to 4 GiB, and treats malformed messages as a defect
of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from grpclib.client import Channel
from grpclib.client import Handler as ClientHandler
from grpclib.client import Stream as Call
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.server import Stream

from resplit.errors import CapacityError
from resplit.security.identity import certificate_name
from resplit.wire.paced_protocol import PacedProtocol
from resplit.wire.plain_messages import ensure_plain

# The hidden states of a whole prompt are one message: 4096 tokens of width 16384 in fp32.
MAX_MESSAGE_BYTES = 256 * 2**20
# Messages up to this size arrive without a look at what else arrives from their sender.
_SMALL_BYTES = 64 * 1024
# The longest answer, a report, has less than half of this.
MAX_ANSWER_BYTES = 4 * 2**20
# Enough for two lost packets of TCP's handshake, which are repeated after 1 s and 3 s, and for the handshake of TLS.
CONNECT_WITHIN_S = 4.0


class Receives(Protocol):
    """A call that is served."""

    async def recv_message(self) -> Any:
        """Its next message, or None."""


class BoundedChannel(Channel):  # type: ignore[misc]  # grpclib has no types here
    """A channel to a server whose answers are limited too: DecodeError for one of more than `MAX_ANSWER_BYTES`.

    ConnectionError if the server cannot be connected within `CONNECT_WITHIN_S`: without a limit, asyncio waits two
    minutes for a machine that is off, and one for a port that accepts a connection and says nothing.
    """

    def request(self, *arguments: Any, **named: Any) -> Any:
        """A call whose answers are limited."""
        call = super().request(*arguments, **named)
        call.__class__ = _BoundedCall  # `Channel` offers no other way to choose the class
        return call

    def _protocol_factory(self) -> PacedProtocol:
        return PacedProtocol(ClientHandler(), self._config, self._h2_config)

    async def _create_connection(self) -> Any:
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                return await super()._create_connection()
        except TimeoutError:
            raise ConnectionError(f"no connection within {CONNECT_WITHIN_S:g} s") from None


class _BoundedCall(Call):  # type: ignore[misc]
    async def send_request(self, *, end: bool = False) -> None:
        await super().send_request(end=end)
        incoming: Any = self._stream
        receive = incoming.recv_data

        async def receive_bounded(size: int) -> bytes:
            if size > MAX_ANSWER_BYTES:
                raise DecodeError(f"an answer of {size} bytes is too long")
            content: bytes = await receive(size)
            return content

        incoming.recv_data = receive_bounded


class Arriving:
    """Counts the bytes of messages of which a part has arrived, by sender. `MAX_MESSAGE_BYTES` of each are kept."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    @contextlib.contextmanager
    def room_for(self, sender: str, size: int) -> Iterator[None]:
        """A context in which a message arrives; CapacityError if there is no room for it. Small ones need none."""
        if size <= _SMALL_BYTES:
            yield
            return
        if self._bytes[sender] + size > MAX_MESSAGE_BYTES:
            raise CapacityError(f"{sender} sends {self._bytes[sender] + size} bytes at the same time")
        self._bytes[sender] += size
        try:
            yield
        finally:
            self._bytes[sender] -= size


def limited(
    mapping: dict[str, Handler], arriving: Arriving, throttle: Callable[[str], Awaitable[None]]
) -> dict[str, Handler]:
    """Limit the handlers of a service: INVALID_ARGUMENT for a malformed message, RESOURCE_EXHAUSTED for a long one.

    `throttle` is awaited, with the caller's name, before a call is refused in such a way, or as the handler says.
    """
    return {path: handler._replace(func=_limited(handler, arriving, throttle)) for path, handler in mapping.items()}


def _limited(handler: Handler, arriving: Arriving, throttle: Callable[[str], Awaitable[None]]) -> Any:
    async def limited_handle(stream: Stream[Any, Any]) -> None:
        incoming: Any = stream._stream
        sender = caller_of(stream)
        receive, in_message = incoming.recv_data, False

        async def receive_bounded(size: int) -> bytes:
            nonlocal in_message
            if size > MAX_MESSAGE_BYTES:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, f"a message of {size} bytes is too long")
            try:
                with arriving.room_for(sender, size):
                    content: bytes = await receive(size)
            except CapacityError as error:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, str(error)) from None
            except AssertionError:  # grpclib raises it for a truncated message
                raise _malformed() from None
            if in_message and len(content) != size:  # the stream ended between a message's length and the message
                raise _malformed()
            if in_message:
                ensure_plain(handler.request_type, content)
            in_message = not in_message
            return content

        incoming.recv_data = receive_bounded
        try:
            await handler.func(stream)
        except StreamTerminatedError:  # nobody waits for an answer; a log of the error would keep what had arrived
            pass
        except (DecodeError, NotImplementedError):  # malformed, or compressed
            await throttle(sender)
            raise _malformed() from None
        except GRPCError:
            await throttle(sender)
            raise

    return limited_handle


def caller_of(stream: Stream[Any, Any]) -> str:
    """The member that made a call, by its certificate, which is decoded once for each connection."""
    return certificate_name(stream.peer._transport.get_extra_info("peercert"))


async def receive_one(stream: Receives) -> Any:
    """The message of a call with exactly one message; GRPCError if the caller sent none."""
    message = await stream.recv_message()
    if message is None:
        raise _malformed()
    return message


def _malformed() -> GRPCError:
    return GRPCError(Status.INVALID_ARGUMENT, "these bytes are not a message of this call")
