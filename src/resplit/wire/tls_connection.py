"""A TLS connection to which any thread may write: a transport of asyncio over a plain one.

asyncio's own TLS belongs to the thread of the event loop. A thread that computes would have to wake it for each
message, and beside compute that takes longer than to encrypt and send the message (docs/adr/0015-stream-of-steps.md).
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, cast

_READ_BYTES = 64 * 1024
_HANDSHAKE_WITHIN_S = 60.0


class _ReadBuffer(threading.local):
    """Room for what arrives. It is copied from there at once, so that all connections of one thread share the room."""

    def __init__(self) -> None:
        self.room = memoryview(bytearray(_READ_BYTES))


_read_buffer = _ReadBuffer()  # each thread has its own


class TlsConnection(asyncio.Transport, asyncio.BufferedProtocol):
    """The protocol of a plain transport, and the transport of the protocol that `begin` makes after the handshake.

    `write`, `abort` and `is_closing` are for all threads, everything else for that of the event loop. `shaken` ends
    with the handshake, and has its error. The client names the `server` that it expects.
    """

    def __init__(
        self, context: ssl.SSLContext, begin: Callable[[], asyncio.BufferedProtocol], server: str | None = None
    ) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._room = _read_buffer.room
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server is None, server)
        self._begin = begin
        self._protocol: asyncio.BufferedProtocol | None = None  # after the handshake
        self._using = threading.Lock()  # held while `_tls` is used, and until what it gives is sent or queued
        self._unsent = bytearray()  # encrypted by other threads, for the event loop to send
        self._socket: socket.socket | None = None  # a descriptor for the writes of other threads
        self._is_paused = False
        self.shaken: asyncio.Future[None] = self._loop.create_future()

    # The transport of the protocol above.

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As for other transports over TLS."""
        if name == "ssl_object":
            return self._tls
        return self._tls.getpeercert() if name == "peercert" else self._plain.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Whether nothing more is sent."""
        return self._plain.is_closing()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send data at once, or as soon as the other side takes it, after all that was written before."""
        with self._using:
            if not self._plain.is_closing():
                try:
                    self._tls.write(data)
                except ssl.SSLError:  # the other side broke the rules of TLS; reading finds that out, too
                    self.abort()
                self._send()

    def close(self) -> None:
        """End the connection once all is sent."""
        self._plain.close()

    def abort(self) -> None:
        """End the connection at once."""
        if threading.get_ident() == self._thread:
            self._plain.abort()
        else:
            self._loop.call_soon_threadsafe(self._plain.abort)

    def pause_reading(self) -> None:
        """Give the protocol nothing more for now."""
        self._is_paused = True
        self._plain.pause_reading()

    def resume_reading(self) -> None:
        """Go on reading, with what has arrived already."""
        self._is_paused = False
        self._plain.resume_reading()
        if self._incoming.pending or self._tls.pending():
            self._loop.call_soon(self._read)

    # The protocol of the plain transport below.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        self._plain = cast(asyncio.Transport, transport)
        self._late = self._loop.call_later(_HANDSHAKE_WITHIN_S, self.abort)
        self._shake_hands()

    def get_buffer(self, _sizehint: int) -> memoryview[Any]:
        """Room for what arrives next."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt what has arrived."""
        with self._using:
            self._incoming.write(self._room[:nbytes])
        if self._protocol is None:
            self._shake_hands()
        else:
            self._read()

    def pause_writing(self) -> None:
        """The other side takes no more for now."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """The other side takes more again."""
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the protocol, or whoever waits for the handshake."""
        self._late.cancel()
        with self._using:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        if not self.shaken.done():
            self._end_handshake(error or ConnectionResetError("the connection ended during its handshake"))
        if self._protocol is not None:
            self._protocol.connection_lost(error)

    def _shake_hands(self) -> None:
        with self._using:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send()
                return
            except ssl.SSLError as error:
                self._send()  # the alert, which says why
                self._end_handshake(error)
                self._plain.close()
                return
            self._send()
        self._late.cancel()
        self._protocol = self._begin()
        self._protocol.connection_made(self)
        if not self.shaken.done():
            self.shaken.set_result(None)
        self._read()

    def _end_handshake(self, error: Exception) -> None:
        if not self.shaken.done():
            self.shaken.set_exception(error)
            self.shaken.exception()  # retrieved: nobody may wait for it

    def _read(self) -> None:
        """Give the protocol all that can be decrypted, until it pauses."""
        assert self._protocol is not None
        while not self._is_paused and not self._plain.is_closing():
            room = self._protocol.get_buffer(-1)
            try:
                with self._using:
                    size = self._tls.read(len(room), room)  # type: ignore[arg-type]  # it takes any buffer
            except ssl.SSLWantReadError:
                with self._using:
                    self._send()  # TLS may have answered by itself
                return
            except ssl.SSLError:
                self._plain.abort()
                return
            if not size:
                self._plain.close()
                return
            self._protocol.buffer_updated(cast(int, size))

    def _send(self) -> None:
        """Send what is encrypted. `_using` is held."""
        sealed = self._outgoing.read()
        if threading.get_ident() == self._thread:
            self._send_unsent(sealed)
            return
        if not self._unsent and not self._plain.get_write_buffer_size():
            sealed = sealed[self._sent_bytes(sealed) :]
        if sealed:
            self._unsent += sealed
            self._loop.call_soon_threadsafe(self._go_on_sending)

    def _sent_bytes(self, sealed: bytes) -> int:
        """How many bytes the socket takes now, in another thread than that of the event loop."""
        if self._socket is None:
            self._socket = socket.socket(fileno=os.dup(self._plain.get_extra_info("socket").fileno()))
        try:
            return self._socket.send(sealed)
        except BlockingIOError:
            return 0
        except OSError:  # the event loop finds out, too
            return len(sealed)

    def _go_on_sending(self) -> None:
        with self._using:
            self._send_unsent(b"")

    def _send_unsent(self, more: bytes) -> None:
        content = bytes(self._unsent) + more if self._unsent else more
        self._unsent.clear()
        if content and not self._plain.is_closing():
            self._plain.write(content)
