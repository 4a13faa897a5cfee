"""The stream of parts of caches to one peer. Transfers share it, and each hears whether all its parts were stored."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass

from resplit.errors import CapacityError
from resplit.model.activation import Activation
from resplit.wire.addresses import Address
from resplit.wire.answered_stream import AnsweredStream
from resplit.wire.emulated_link import until
from resplit.wire.message_stream import length_of
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


class CacheStream:
    """Sends parts of caches to one peer."""

    def __init__(self, peer: str, address: Address, context: ssl.SSLContext) -> None:
        self._peer = peer
        self._stream = AnsweredStream(
            "caches", CacheReply, lambda reply: reply.transfer, _MOST_REPLY_BYTES, peer, address, context
        )

    async def send(self, parts: Sequence[tuple[float, OutgoingPart]]) -> None:
        """A transfer: send parts, each at its time on the event loop's clock, and wait until the peer has stored them.

        CapacityError if the peer refuses a part, after which no more are sent; OSError if the stream breaks.
        """
        opened = await self._stream.opened()
        with opened.awaiting() as (number, reply):
            for left, (at_s, part) in zip(range(len(parts) - 1, -1, -1), parts, strict=True):
                await until(at_s)
                if reply.done():
                    break
                await opened.stream.write(part.framed(number, ends=left == 0))
            if error := (await reply).error:
                raise CapacityError(f"{self._peer}: {error}")

    async def close(self) -> None:
        """End the stream, and the transfers over it."""
        await self._stream.close()
