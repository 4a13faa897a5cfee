"""The key/value caches of sessions on a node: received from other nodes, sent to them, and freed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence

from resplit.errors import CommandRefusedError, DataError
from resplit.model.activation import Activation
from resplit.node.connections import Connections
from resplit.node.hosting import Hosting
from resplit.wire.cache_stream import OutgoingPart
from resplit.wire.node_pb2 import CachePart, TransferReply, TransferRequest
from resplit.wire.peers import CHUNK_BYTES, Peer
from resplit.wire.permits import Permit
from resplit.wire.tensors import from_wire


class SessionCaches:
    """Receives, sends and frees the caches of one node."""

    def __init__(self, hosting: Hosting, connections: Connections) -> None:
        self._hosting = hosting
        self._connections = connections

    def take(self, sender: str, part: CachePart) -> None:
        """Store a part of a session's caches.

        CommandRefusedError if the session's permit does not name `sender` for these blocks and this attempt, or if one
        is private and this node not trusted: then nothing is stored. CapacityError if a cache does not fit; DataError
        if the part does not match what is held.
        """
        permit, blocks = self._hosting.permits.of(part.session, part.attempt), tuple(part.blocks)
        if others := [block for block in blocks if permit.senders.get(block) != sender]:
            reason = f"{sender} may not send the cache of block {others[0]} of session {part.session}"
            raise CommandRefusedError("unexpected", reason)
        self._hosting.refuse_private(blocks)
        executor = self._hosting.running()
        for block, values in zip(blocks, _of_each(len(blocks), from_wire(part.values)), strict=True):
            executor.take_cache(part.session, block, part.first, permit.capacity, values, part.attempt)

    async def transfer(self, request: TransferRequest) -> TransferReply:
        """Send positions `first..last-1` of a session's caches to the nodes that `target` names, one for each block.

        CommandRefusedError without a permit for this attempt; DataError if positions are not cached here, or the
        address of a node is not known; CapacityError if a node does not take its part; NodeLostError if one is lost.
        """
        self._hosting.permits.of(request.session, request.attempt)
        engine = self._hosting.running().engine
        blocks_by_node: dict[str, list[int]] = {}
        for block, name in enumerate(request.target[: len(engine.features)]):
            if name and engine.has_cache(block):
                blocks_by_node.setdefault(name, []).append(block)
        peers = [self._connections.peer(name) for name in blocks_by_node]
        sent = [self._send(peer, request, blocks) for peer, blocks in zip(peers, blocks_by_node.values(), strict=True)]
        return TransferReply(bytes=sum(await asyncio.gather(*sent)))

    async def permit(self, session: str, permit: Permit, keep: bool) -> dict[int, int]:
        """Replace the permit of a session.

        If an attempt begins with it, the caches of the attempt before are freed, or with `keep` their positions
        returned, by block. CommandRefusedError if the session has ended or a later attempt has begun.
        """
        begins, executor = self._hosting.permits.give(session, permit), self._hosting.executor
        if not begins or executor is None:
            return {}
        held = await executor.held_positions(session)
        if not keep:
            executor.engine.close(session)
        return held if keep else {}

    def close(self, sessions: Collection[str]) -> None:
        """Free the caches of these sessions, and refuse their messages from now on."""
        for session in sessions:
            self._hosting.permits.end(session)
            if self._hosting.executor:
                self._hosting.executor.end(session)

    def sessions(self) -> set[str]:
        """Sessions that hold a cache or have a permit here."""
        executor = self._hosting.executor
        return executor.sessions() if executor else self._hosting.permits.sessions()

    async def _send(self, peer: Peer, request: TransferRequest, blocks: list[int]) -> int:
        """Send a session's caches of these blocks to one node. Returns the bytes sent."""
        if not request.background:
            return await peer.cache(list(self._parts(request, blocks, lambda: CHUNK_BYTES)))
        return await peer.cache_in_background(self._parts(request, blocks, lambda: peer.background_bytes))

    def _parts(
        self, request: TransferRequest, blocks: list[int], most_bytes: Callable[[], int]
    ) -> Iterator[OutgoingPart]:
        """The caches in parts of at most `most_bytes`, or of one position of one block if that is more."""
        features, positions = self._hosting.running().engine.features, request.last - request.first
        position_bytes = max(features[block].kv_bytes_per_token for block in blocks)
        while blocks and positions > 0:
            room = max(1, int(most_bytes() / position_bytes))  # for positions of one block
            together, blocks = blocks[: max(1, room // positions)], blocks[max(1, room // positions) :]
            for first in range(request.first, request.last, room):
                yield self._part(request, together, first, min(first + room, request.last))

    def _part(self, request: TransferRequest, blocks: Sequence[int], first: int, last: int) -> OutgoingPart:
        engine = self._hosting.running().engine
        caches = [engine.export_cache(request.session, block, first, last) for block in blocks]
        return OutgoingPart(request.session, request.attempt, blocks, first, caches)


def _of_each(blocks: int, values: Activation) -> list[Activation]:
    """Keys and values of each block, (2, heads, positions, width), from those of all; DataError for another number."""
    values.ensure_valid()
    if values.shape[0] != 2 * blocks:
        raise DataError(f"a part of the caches of {blocks} blocks has the shape {values.shape}")
    size = len(values.data) // blocks
    shape = 2, *values.shape[1:]
    return [Activation(values.dtype, shape, values.data[i * size : (i + 1) * size]) for i in range(blocks)]
