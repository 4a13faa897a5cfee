"""The key/value caches of sessions on a node: received from other nodes, sent to them, and freed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator

from resplit.errors import CommandRefusedError
from resplit.node.connections import Connections
from resplit.node.hosting import Hosting
from resplit.wire.node_pb2 import CachePart, TransferReply, TransferRequest
from resplit.wire.peers import BACKGROUND_BYTES, CHUNK_BYTES, Peer
from resplit.wire.permits import Permit
from resplit.wire.tensors import from_wire, to_wire


class SessionCaches:
    """Receives, sends and frees the caches of one node."""

    def __init__(self, hosting: Hosting, connections: Connections) -> None:
        self._hosting = hosting
        self._connections = connections

    def take(self, sender: str, part: CachePart) -> None:
        """Store a part of a session's cache of one block.

        CommandRefusedError if the session's permit does not name `sender` for this block and attempt, or if the block
        is private and this node not trusted; CapacityError if the cache does not fit; DataError if the part does not
        match what is held.
        """
        permit = self._hosting.permits.of(part.session, part.attempt)
        if permit.senders.get(part.block) != sender:
            reason = f"{sender} may not send the cache of block {part.block} of session {part.session}"
            raise CommandRefusedError("unexpected", reason)
        self._hosting.refuse_private((part.block,))
        values, executor = from_wire(part.values), self._hosting.running()
        executor.take_cache(part.session, part.block, part.first, permit.capacity, values, part.attempt)

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

    def close_except(self, known: Collection[str]) -> None:
        """Close all other sessions: the gateway has no request for them any more."""
        executor = self._hosting.executor
        here = executor.sessions() if executor else self._hosting.permits.sessions()
        self.close(sorted(here.difference(known)))

    async def _send(self, peer: Peer, request: TransferRequest, blocks: list[int]) -> int:
        """Send a session's caches of these blocks to one node. Returns the bytes sent."""
        if not request.background:
            return await peer.cache(list(self._parts(request, blocks, CHUNK_BYTES)))
        return await peer.cache_in_background(self._parts(request, blocks, BACKGROUND_BYTES))

    def _parts(self, request: TransferRequest, blocks: list[int], most_bytes: int) -> Iterator[CachePart]:
        """The caches in parts of at most `most_bytes`, or of one position if that is more."""
        engine = self._hosting.running().engine
        for block in blocks:
            stride = max(1, int(most_bytes / engine.features[block].kv_bytes_per_token))
            for first in range(request.first, request.last, stride):
                values = engine.export_cache(request.session, block, first, min(first + stride, request.last))
                yield CachePart(
                    session=request.session,
                    attempt=request.attempt,
                    block=block,
                    first=first,
                    values=to_wire(values),
                )
