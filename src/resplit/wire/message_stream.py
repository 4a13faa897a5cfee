"""A stream of protobuf messages over a TLS connection of its own, each after its length (4 bytes, big-endian).

A step over gRPC costs several times what its encryption does (docs/adr/0015-stream-of-steps.md), and so does a token,
a part of a cache, or a call. Commands, which are rare, stay with gRPC. What a connection carries is agreed in its TLS
handshake (ALPN).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from resplit.errors import CapacityError, DataError
from resplit.security.identity import certificate_name
from resplit.wire import message_limits
from resplit.wire.addresses import Address
from resplit.wire.message_limits import Arriving
from resplit.wire.plain_messages import ensure_plain
from resplit.wire.tls_connection import TlsConnection

# A write of more bytes at once, or more messages taken at once, would hold up the event loop.
_WRITE_BYTES = 256 * 1024
_TAKEN_PER_TURN = 64
# Room for what arrives: at first for a record of TLS, kept up to that for the usual parts of caches.
_ROOM_BYTES, _KEPT_ROOM_BYTES = 16 * 1024, 512 * 1024
_LENGTH = struct.Struct(">I")


class Parsed(Protocol):
    """A type of messages, as its own code reads one: protobuf does not declare it."""

    @staticmethod
    def FromString(content: bytes) -> Any: ...  # noqa: N802 - protobuf's name


Incoming = TypeVar("Incoming", bound=Message)


class MessageStream(asyncio.BufferedProtocol, Generic[Incoming]):
    """One end of a stream. The messages that arrive are of type `kind`, and have at most `most_bytes`.

    They are decrypted to where they are read: asyncio would otherwise take and free 64 KiB at each read.

    `arriving` bounds what is kept of messages of which only a part has arrived. `on_ended` is called once the
    connection has ended.
    """

    transport: asyncio.Transport
    member: str  # at the other end, by its certificate

    def __init__(
        self,
        kind: type[Incoming],
        most_bytes: int,
        arriving: Arriving | None = None,
        on_ended: Callable[[MessageStream[Incoming]], None] = lambda stream: None,
    ) -> None:
        self._kind = kind
        self._parse = cast(Parsed, kind).FromString
        self._most_bytes = most_bytes
        self._arriving = arriving or Arriving()
        self._on_ended = on_ended
        self._take: Callable[[Incoming], None] = lambda message: None
        self._buffer = memoryview(bytearray(_ROOM_BYTES))
        self._first, self._last = 0, 0  # where in it the bytes are that arrived and were not taken
        self._size: int | None = None  # of the message that arrives, once its length has
        self._room: contextlib.ExitStack | None = None  # for a message that is longer than what has arrived
        self._next_turn: asyncio.TimerHandle | None = None  # in which more messages are taken
        self._writable = asyncio.Event()
        self._writable.set()
        self._writing = asyncio.Lock()  # held by a long write, which must not be cut by another one
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def is_agreed(self, protocol: str) -> bool:
        """Whether both ends said in the TLS handshake that the connection carries this."""
        return bool(self.transport.get_extra_info("ssl_object").selected_alpn_protocol() == protocol)

    async def each(self, take: Callable[[Incoming], None]) -> None:
        """Call `take` with each message as it arrives, until the other side ends the connection.

        DataError for bytes that are no message, CapacityError for more bytes than may be kept, and what `take` raises.
        All of them end the connection.
        """
        self._take = take
        self.transport.resume_reading()
        await asyncio.shield(self._end)

    async def send(self, messages: Sequence[Message]) -> None:
        """Send messages with one write, in order. They are dropped if the connection has ended."""
        contents = [message.SerializeToString() for message in messages]
        await self.write([part for each in contents for part in (length_of(each), each)])

    async def write(self, pieces: Sequence[bytes]) -> None:
        """Send messages that are serialised already, each after its length (`length_of`). Otherwise as `send`."""
        content = b"".join(pieces)
        async with self._writing:
            for first in range(0, len(content), _WRITE_BYTES):
                if not self._writable.is_set():
                    await self._until_writable(begun=first > 0)
                if self.transport.is_closing():
                    return
                self.transport.write(content[first : first + _WRITE_BYTES] if len(content) > _WRITE_BYTES else content)

    async def writable(self) -> None:
        """Wait until the other side takes more, or the connection has ended."""
        await self._writable.wait()

    async def _until_writable(self, begun: bool) -> None:
        try:
            await self._writable.wait()
        except asyncio.CancelledError:
            if begun:  # the rest of the message will not come, so that nothing can come after it
                self.abort()
            raise

    def put(self, message: Message) -> None:
        """Send one message at once, where nothing is sent by `send`. It is dropped if the connection has ended."""
        if not self.transport.is_closing():
            content = message.SerializeToString()
            self.transport.write(length_of(content) + content)

    def is_ready(self) -> bool:
        """Whether a message that is `put` now goes to the other side at once. Any thread may ask."""
        return self._writable.is_set() and not self._writing.locked() and not self.transport.is_closing()

    def rest(self, seconds: float) -> None:
        """Take and read nothing more for so long."""
        if self._next_turn is not None:
            self._next_turn.cancel()
        self.transport.pause_reading()
        self._next_turn = asyncio.get_running_loop().call_later(seconds, self._go_on)

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for `each` before anything is read."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()
        self.member = certificate_name(transport.get_extra_info("peercert"))

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Room for what arrives next. It grows with what has arrived, not with what was announced."""
        if self._last == len(self._buffer):
            self._make_room()
        return self._buffer[self._last :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take the messages that are complete. If they are many, others have their turn in between."""
        if self._end.done():
            return
        self._last += nbytes
        if self._next_turn is None:
            self._take_some()

    def pause_writing(self) -> None:
        """The other side takes no more for now."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The other side takes more again."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Let go of everything."""
        self._writable.set()
        self._finish(None)
        self._on_ended(self)

    def _take_some(self) -> None:
        try:
            for _ in range(_TAKEN_PER_TURN):
                if (message := self._next()) is None:
                    return
                self._take(message)
                if self._next_turn is not None:  # `take` has it rest
                    return
        except Exception as error:
            self._finish(error)
            self.abort()
        else:
            self.rest(0.0)

    def _go_on(self) -> None:
        self._next_turn = None
        if self._end.done():
            return
        self._take_some()
        if self._next_turn is None:
            self.transport.resume_reading()

    def _make_room(self) -> None:
        """Move what has arrived to the front, or to twice the room if it fills more than half of it."""
        arrived = self._buffer[self._first : self._last]
        if 2 * len(arrived) > len(self._buffer):
            self._buffer = memoryview(bytearray(2 * len(self._buffer)))
        self._buffer[: len(arrived)] = arrived
        self._first, self._last = 0, len(arrived)

    def _taken(self, end: int) -> None:
        """Forget what arrived before `end`."""
        self._first = end
        if self._first == self._last:
            self._first = self._last = 0
            if len(self._buffer) > _KEPT_ROOM_BYTES:
                self._buffer = memoryview(bytearray(_ROOM_BYTES))

    def _next(self) -> Incoming | None:
        """The next message that has arrived; None if it is not complete."""
        arrived = self._last - self._first
        if self._size is None:
            if arrived < _LENGTH.size:
                return None
            (self._size,) = _LENGTH.unpack_from(self._buffer, self._first)
            if self._size > self._most_bytes:
                raise CapacityError(
                    f"{self.member} sends a message of {self._size} bytes, the limit is {self._most_bytes}"
                )
            if arrived < _LENGTH.size + self._size:  # else nothing is kept of it
                self._room = contextlib.ExitStack()
                self._room.enter_context(self._arriving.room_for(self.member, self._size))
        if arrived < _LENGTH.size + self._size:
            return None
        first = self._first + _LENGTH.size
        content = bytes(self._buffer[first : first + self._size])
        self._taken(first + self._size)
        self._size = None
        self._leave_room()
        try:
            ensure_plain(self._kind, content)
            return cast(Incoming, self._parse(content))
        except DecodeError:
            raise DataError(f"{self.member} sent {len(content)} bytes that are no message of this stream") from None

    def _leave_room(self) -> None:
        if self._room is not None:
            self._room.close()
            self._room = None

    def _finish(self, error: Exception | None) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._leave_room()
        self._buffer = memoryview(bytearray(_ROOM_BYTES))
        self._first = self._last = 0
        if self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
            self._end.exception()  # retrieved: nobody may wait in `each`


def length_of(*pieces: bytes) -> bytes:
    """What stands before a message of these pieces."""
    return _LENGTH.pack(sum(map(len, pieces)))


async def connected(
    kind: type[Incoming], most_bytes: int, peer: str, address: Address, context: ssl.SSLContext
) -> MessageStream[Incoming]:
    """A new stream to `peer`; OSError if it does not listen in time, or proves another name."""
    stream = MessageStream(kind, most_bytes)
    connection = TlsConnection(context, lambda: stream, peer)
    try:
        async with asyncio.timeout(message_limits.CONNECT_WITHIN_S):
            plain, _ = await asyncio.get_running_loop().create_connection(
                lambda: connection, address.host, address.port
            )
            try:
                await asyncio.shield(connection.shaken)
            except BaseException:
                plain.abort()
                raise
    except TimeoutError:
        raise ConnectionError(f"no connection within {message_limits.CONNECT_WITHIN_S:g} s") from None
    return stream
