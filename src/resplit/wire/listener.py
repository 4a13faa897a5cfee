"""A listening socket that strangers cannot exhaust: connections are bounded, and idle ones make way for new ones."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import structlog

from resplit.errors import ConfigError
from resplit.wire.addresses import Address

_log = structlog.get_logger(__name__)
IDLE_S = 10.0
# asyncio accepts this many connections before it serves those that it has. So a flood of them does not delay the
# others much, and a real client is served before later connections push it out.
ACCEPTED_PER_TURN = 4
_QUEUE = 1024  # connections that wait in the kernel to be accepted
_MOST_CLOSING = 128  # connections beyond the limit that are about to close
_LOG_EVERY_S = 10.0


class Listener(socket.socket):
    """Accepts connections for asyncio (`create_server(sock=...)`) at one address.

    A connection is idle until its owner calls `begin`, and again after as many calls of `end`. `begin` means that a
    member proved who it is, or that a client sent the head of a request. An idle connection is closed after `IDLE_S`.
    So is the oldest idle one for each new connection beyond `limit`, or beyond half of it from the same host. If none
    is idle, or the process has no descriptor left, the new one is refused.
    """

    def __init__(self, address: Address, limit: int) -> None:
        """Bind the address, IPv4 if its host has both. ConfigError if that is not possible.

        At most `limit` connections are open at once, and at most half as many as the process may have descriptors.
        """
        family, sockaddr = _resolve(address)
        # With the protocol named, asyncio turns off the delay of small messages (TCP_NODELAY); 0 would leave it on.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.bind(sockaddr)
        except OSError as error:
            super().close()
            raise _cannot_listen(address, error) from None
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = limit if descriptors == resource.RLIM_INFINITY else min(limit, descriptors // 2)
        self._open: set[_AcceptedConnection] = set()
        # A client may use its port again before its last end is noticed.
        self._newest: dict[_Peer, _AcceptedConnection] = {}
        self._idle: dict[_AcceptedConnection, asyncio.TimerHandle] = {}  # a subset of `_open`, the oldest first
        # Closed to accept one connection, and so to refuse it, when the process has no other descriptor.
        self._spare: int | None = _spare_descriptor()
        self._refused = 0
        self._next_log_s = 0.0

    def listen(self, _backlog: int = 0, /) -> None:
        """Start to listen. The argument is ignored: asyncio passes the number of connections to accept per turn."""
        super().listen(_QUEUE)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection; BlockingIOError if none waits, or if the next one was refused."""
        try:
            accepted, peer = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or self._spare is None:
                raise
            self._refuse_without_descriptor()
            raise BlockingIOError(errno.EAGAIN, "a connection was refused") from None
        self._make_room(peer[0])
        if len(self._open) >= self.limit + _MOST_CLOSING:
            accepted.close()
            self._note_refusal(f"{self.limit} connections are open", peer[0])
            raise BlockingIOError(errno.EAGAIN, "a connection was refused")
        connection = _AcceptedConnection(self, accepted, peer[:2])
        self._open.add(connection)
        self._newest[connection.peer] = connection
        self._becomes_idle(connection)
        return connection, peer

    def close(self) -> None:
        """Stop listening. Open connections stay open."""
        super().close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def begin(self, peer: _Peer) -> None:
        """The connection from `peer` (host, port) has a call or a request to serve."""
        if connection := self._newest.get(peer):
            connection.served += 1
            self._is_not_idle(connection)

    def end(self, peer: _Peer) -> None:
        """A request is served. Without another one, the connection is idle."""
        if connection := self._newest.get(peer):
            connection.served -= 1
            if not connection.served:
                self._becomes_idle(connection)

    @contextlib.contextmanager
    def serving(self, peer: _Peer) -> Iterator[None]:
        """A context in which a request of `peer` is served."""
        self.begin(peer)
        try:
            yield
        finally:
            self.end(peer)

    def sending(self, peer: _Peer) -> AbstractContextManager[None]:
        """A context in which a part of an answer is sent: a client that takes none of it for `IDLE_S` is disconnected.

        The connection of such a client is not idle, so it would otherwise stay for ever and never make way.
        """
        connection = self._newest.get(peer)
        return connection.sending if connection else contextlib.nullcontext()

    def forget(self, connection: _AcceptedConnection) -> None:
        """A connection is closed."""
        self._is_not_idle(connection)
        self._open.discard(connection)
        if self._newest.get(connection.peer) is connection:
            del self._newest[connection.peer]

    def _make_room(self, host: str) -> None:
        """Close the oldest idle connection if there are too many, in all or of this host."""
        of_host = [each for each in self._idle if each.peer[0] == host]
        if len(of_host) >= max(1, self.limit // 2):
            self._end_idle(of_host[0])
        elif len(self._open) >= self.limit and self._idle:
            self._end_idle(next(iter(self._idle)))

    def _becomes_idle(self, connection: _AcceptedConnection) -> None:
        self._idle[connection] = asyncio.get_running_loop().call_later(IDLE_S, self._end_idle, connection)

    def _is_not_idle(self, connection: _AcceptedConnection) -> None:
        if timer := self._idle.pop(connection, None):
            timer.cancel()

    def _end_idle(self, connection: _AcceptedConnection) -> None:
        self._is_not_idle(connection)
        _shut_down(connection)

    def _refuse_without_descriptor(self) -> None:
        assert self._spare is not None
        os.close(self._spare)
        self._spare = None
        with contextlib.suppress(OSError):
            refused, peer = super().accept()
            refused.close()
            self._note_refusal("the process has no file descriptor left", peer[0])
        with contextlib.suppress(OSError):
            self._spare = _spare_descriptor()

    def _note_refusal(self, reason: str, host: str) -> None:
        """Log, at most every `_LOG_EVERY_S`: strangers must not fill the disk with log lines."""
        self._refused += 1
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_log_s:
            _log.warning("connections are refused", reason=reason, host=host, refused=self._refused)
            self._refused, self._next_log_s = 0, now_s + _LOG_EVERY_S


_Peer = tuple[str, int]


class _AcceptedConnection(socket.socket):
    """A connection that tells its listener when it is closed. `served` counts the requests that are being served."""

    def __init__(self, listener: Listener, accepted: socket.socket, peer: _Peer) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self.peer = peer
        self.served = 0
        self.sending = _Sending(self)
        self._listener = listener

    def close(self) -> None:
        self.sending.stop()
        self._listener.forget(self)
        super().close()


class _Sending(AbstractContextManager[None]):
    """In it a part of an answer is sent. One timer serves all parts of `IDLE_S`: a token of a stream is a part."""

    def __init__(self, connection: _AcceptedConnection) -> None:
        self._connection = connection
        self._since_s: float | None = None  # event loop's clock; None: nothing is sent now
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._since_s = asyncio.get_running_loop().time()
        if self._timer is None:
            self._watch()

    def __exit__(self, *_: object) -> None:
        self._since_s = None

    def stop(self) -> None:
        """The connection is closed."""
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        """Shut the connection down if what is sent now was not taken for `IDLE_S`; otherwise look again then."""
        self._timer, loop = None, asyncio.get_running_loop()
        if self._since_s is None:
            return
        due_s = self._since_s + IDLE_S
        if loop.time() >= due_s:
            _shut_down(self._connection)
        else:
            self._timer = loop.call_at(due_s, self._watch)


def _shut_down(connection: _AcceptedConnection) -> None:
    """Have its transport see the end of the connection and close it. Only the transport may close its socket."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _spare_descriptor() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _resolve(address: Address) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _cannot_listen(address, error) from None
    family, _, _, _, sockaddr = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, sockaddr


def _cannot_listen(address: Address, error: OSError) -> ConfigError:
    return ConfigError(str(address), f"cannot listen there: {error.strerror or error}; choose another address")
