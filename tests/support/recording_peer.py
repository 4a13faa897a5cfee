"""A peer that records requests for cache transfers instead of sending them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from resplit.wire.node_pb2 import TransferReply, TransferRequest


@dataclass
class RecordingPeer:
    """Answers every request with `reply`, once `answering` is set."""

    reply: TransferReply = field(default_factory=lambda: TransferReply(bytes=100))
    requests: list[TransferRequest] = field(default_factory=list)
    answering: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answering.set()

    async def transfer_cache(self, request: TransferRequest) -> TransferReply:
        self.requests.append(request)
        await self.answering.wait()
        return self.reply
