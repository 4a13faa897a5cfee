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
    follows: bool = False  # it begins the passes after a step itself, as far as that is asked
    followed_until: list[int] = field(default_factory=list)  # each position up to which it was asked to
    times: Iterator[list[SegmentTime]] = field(default_factory=lambda: iter(()))  # of the segments, for each step

    def __post_init__(self) -> None:
        self.transferring.set()
        self._until = 0

    def send(self, step: Step) -> None:
        if step.HasField("permit"):
            self.permits.append(Permit.from_wire(step.permit))
        if step.follow_until or not step.HasField("permit"):
            self.followed_until.append(step.follow_until)
        if step.HasField("values"):
            self.steps.append(step)
            self._until = step.follow_until
            self._answer(step, step.start, step.start + step.values.shape[1])
        elif not step.HasField("permit"):
            self._until = step.follow_until

    def _answer(self, step: Step, start: int, end: int) -> None:
        """Answer a pass over these positions, and all that follow it, each in a turn of the event loop."""
        token = Token(session=step.session, attempt=step.attempt, epoch=step.epoch, position=end)
        token.token_ids.extend((start + number) % 100 for number in range(1 + step.drafts))
        token.times.extend(next(self.times, []))

        def give() -> None:
            is_newest = self.steps[-1] is step
            token.followed = (
                self.follows and is_newest and end < self._until and token.token_ids[0] not in step.stop_ids
            )
            self.on_token(token)
            if token.followed:
                self._answer(step, end, end + 1)

        asyncio.get_running_loop().call_soon(give)

    async def transfer_cache(self, request: TransferRequest) -> TransferReply:
        self.requests.append(request)
        await self.transferring.wait()
        return self.reply

    async def permit(self, session: str, permit: Permit, keep: bool, timeout_s: float = 5.0) -> dict[int, int]:
        self.permits.append(permit)
        return self.held if keep else {}

    async def close_sessions(self, sessions: list[str]) -> None:
        self.closed.extend(sessions)
