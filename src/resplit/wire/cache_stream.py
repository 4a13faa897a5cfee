"""The stream of parts of caches to one peer. Transfers share it, and each hears whether all its parts were stored."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field

from resplit.errors import CapacityError, ResplitError
from resplit.model.activation import Activation
from resplit.process.cancellation import cancel_and_wait
from resplit.wire.addresses import Address
from resplit.wire.links import until
from resplit.wire.message_stream import MessageStream, connected, length_of
from resplit.wire.node_pb2 import CachePart, CacheReply
from resplit.wire.tensors import data_prefix

_MOST_REPLY_BYTES = 4096


@dataclass(frozen=True)
class OutgoingPart:
    """The same positions of a session's caches of some blocks, from `first` on, on their way to another node.

    `caches` are the keys and values of each block, (2, heads, positions, width).
    """

    session: str
    attempt: int
    blocks: Sequence[int]
    first: int
    caches: Sequence[Activation]

    @property
    def size_bytes(self) -> int:
        """Of the caches."""
        return sum(len(cache.data) for cache in self.caches)

    def framed(self, transfer: int, ends: bool) -> list[bytes]:
        """The message with its length, in pieces. `transfer` is its number, and it may be the last part of that."""
        head = CachePart(session=self.session, attempt=self.attempt, blocks=self.blocks, first=self.first)
        head.values.dtype = self.caches[0].dtype
        head.values.shape[:] = len(self.blocks) * 2, *self.caches[0].shape[1:]
        head.transfer, head.ends = transfer, ends
        data = [cache.data for cache in self.caches]
        pieces = [head.SerializeToString(), data_prefix(CachePart.VALUES_FIELD_NUMBER, self.size_bytes), *data]
        return [length_of(*pieces), *pieces]


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

    async def send(self, parts: Sequence[tuple[float, OutgoingPart]]) -> None:
        """A transfer: send parts, each at its time on the event loop's clock, and wait until the peer has stored them.

        CapacityError if the peer refuses a part, after which no more are sent; OSError if the stream breaks.
        """
        connection = await self._opened()
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        connection.awaited[number] = answer
        try:
            for left, (at_s, part) in zip(range(len(parts) - 1, -1, -1), parts, strict=True):
                await until(at_s)
                if answer.done():
                    break
                async with connection.writing:
                    await connection.stream.write(part.framed(number, ends=left == 0))
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
