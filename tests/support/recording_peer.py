"""A peer that records steps and requests for cache transfers, and answers them without a node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from resplit.wire.node_pb2 import SegmentTime, Step, Token, TransferReply, TransferRequest
from resplit.wire.permits import Permit


@dataclass
class RecordingPeer:
    """Answers transfers with `reply`, once `transferring` is set, and steps with tokens from `start % 100` on."""

    reply: TransferReply = field(default_factory=lambda: TransferReply(bytes=100))
    held: dict[int, int] = field(default_factory=dict)  # positions by block, as `permit` reports them
    on_token: Callable[[Token], None] = lambda token: None
    transferring: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[TransferRequest] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    permits: list[Permit] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    times: Iterator[list[SegmentTime]] = field(default_factory=lambda: iter(()))  # of the segments, for each step

    def __post_init__(self) -> None:
        self.transferring.set()

    def send(self, step: Step) -> None:
        if step.HasField("permit"):
            self.permits.append(Permit.from_wire(step.permit))
        if not step.HasField("values"):
            return
        self.steps.append(step)
        end = step.start + step.values.shape[1]
        token = Token(session=step.session, attempt=step.attempt, epoch=step.epoch, position=end)
        token.token_ids.extend((step.start + number) % 100 for number in range(1 + step.drafts))
        token.times.extend(next(self.times, []))
        asyncio.get_running_loop().call_soon(self.on_token, token)

    async def transfer_cache(self, request: TransferRequest) -> TransferReply:
        self.requests.append(request)
        await self.transferring.wait()
        return self.reply

    async def permit(self, session: str, permit: Permit, keep: bool, timeout_s: float = 5.0) -> dict[int, int]:
        self.permits.append(permit)
        return self.held if keep else {}

    async def close_sessions(self, sessions: list[str]) -> None:
        self.closed.extend(sessions)
