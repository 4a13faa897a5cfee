"""The stream of parts of caches to one peer. Transfers share it, and each hears whether all its parts were stored."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from resplit.errors import CapacityError, ResplitError
from resplit.process.cancellation import cancel_and_wait
from resplit.wire.addresses import Address
from resplit.wire.message_stream import MessageStream, connected
from resplit.wire.node_pb2 import CachePart, CacheReply

_MOST_REPLY_BYTES = 4096
Send = Callable[[Sequence[CachePart]], Awaitable[None]]


@dataclass
class _Connection:
    """An open stream, and the answers that transfers over it await, by number."""

    stream: MessageStream[CacheReply]
    awaited: dict[int, asyncio.Future[str]] = field(default_factory=dict)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)  # a long write must not be cut by another one


class CacheStream:
    """Sends parts of caches to one peer. The first transfer opens the stream, and the first after it broke."""

    def __init__(self, peer: str, address: Address, context: ssl.SSLContext) -> None:
        self._peer = peer
        self._address = address
        self._context = context
        self._connection: _Connection | None = None
        self._opening = asyncio.Lock()
        self._receiving: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)

    @contextlib.asynccontextmanager
    async def transfer(self) -> AsyncIterator[Send]:
        """A transfer: the body sends its parts, and the end waits until the peer has stored them.

        CapacityError if the peer refuses a part, in the body too; OSError if the stream breaks.
        """
        connection = await self._opened()
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        connection.awaited[number] = answer

        async def send(parts: Sequence[CachePart]) -> None:
            if answer.done():
                raise CapacityError(f"{self._peer}: {answer.result()}")
            for part in parts:
                part.transfer = number
            async with connection.writing:
                await connection.stream.send(parts)

        try:
            yield send
            await send([CachePart(ends=True)])
            if error := await answer:
                raise CapacityError(f"{self._peer}: {error}")
        finally:
            del connection.awaited[number]

    async def close(self) -> None:
        """End the stream, and the transfers over it."""
        await cancel_and_wait(self._receiving)

    async def _opened(self) -> _Connection:
        async with self._opening:
            if self._connection is None:
                stream = await connected(CacheReply, _MOST_REPLY_BYTES, self._peer, self._address, self._context)
                self._connection = _Connection(stream)
                receiving = asyncio.create_task(self._receive(self._connection), name=f"caches to {self._peer}")
                self._receiving.add(receiving)
                receiving.add_done_callback(self._receiving.discard)
            return self._connection

    async def _receive(self, connection: _Connection) -> None:
        error: Exception = ConnectionResetError(f"{self._peer} closed its stream of caches")
        try:
            await connection.stream.each(lambda reply: _answer(connection, reply))
        except ResplitError as fault:
            error = ValueError(str(fault))  # not a refusal: the peer sent what is no answer
        finally:
            self._connection = None
            connection.stream.abort()
            for awaited in connection.awaited.values():
                if not awaited.done():
                    awaited.set_exception(error)
                    awaited.exception()  # retrieved: the transfer may have failed already


def _answer(connection: _Connection, reply: CacheReply) -> None:
    """Note the first answer to a transfer. It may have been given up, or refused before it ended."""
    awaited = connection.awaited.get(reply.transfer)
    if awaited and not awaited.done():
        awaited.set_result(reply.error)
