"""A peer that records steps and requests for cache transfers, and answers them without a node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from resplit.wire.node_pb2 import Step, Token, TransferReply, TransferRequest


@dataclass
class RecordingPeer:
    """Answers transfers with `reply`, once `transferring` is set, and steps with the token `start % 100`."""

    reply: TransferReply = field(default_factory=lambda: TransferReply(bytes=100))
    held: dict[int, int] = field(default_factory=dict)  # positions by block, as `begin_attempt` reports them
    on_token: Callable[[Token], None] = lambda token: None
    transferring: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[TransferRequest] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.transferring.set()

    def send(self, step: Step) -> None:
        self.steps.append(step)
        token = Token(session=step.session, attempt=step.attempt, epoch=step.epoch, token_id=step.start % 100)
        asyncio.get_running_loop().call_soon(self.on_token, token)

    async def transfer_cache(self, request: TransferRequest) -> TransferReply:
        self.requests.append(request)
        await self.transferring.wait()
        return self.reply

    async def begin_attempt(self, session: str, attempt: int) -> dict[int, int]:
        self.attempts.append(attempt)
        return self.held

    async def close_sessions(self, sessions: list[str]) -> None:
        self.closed.extend(sessions)
