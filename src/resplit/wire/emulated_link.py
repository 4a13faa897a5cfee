"""An emulated link, one direction: messages queue for its bandwidth, then travel for its latency, in order.

A link without a shape adds no delay to the real connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from resplit.errors import CapacityError

Message = TypeVar("Message")


@dataclass(frozen=True)
class Shape:
    """Propagation delay and bandwidth of an emulated link."""

    latency_s: float
    bandwidth_bytes_per_s: float


class EmulatedLink:
    """One direction between two members."""

    def __init__(self, shape: Shape | None = None) -> None:
        self.shape = shape
        self._free_s = 0.0
        self._last_due_s = 0.0

    def due_s(self, payload_bytes: int) -> float:
        """When a message of this size arrives if it is sent now, after all earlier ones (event loop's clock)."""
        now_s = asyncio.get_running_loop().time()
        if self.shape is None:
            return now_s
        self._free_s = max(now_s, self._free_s) + payload_bytes / self.shape.bandwidth_bytes_per_s
        self._last_due_s = max(self._free_s + self.shape.latency_s, self._last_due_s)
        return self._last_due_s

    async def cross(self, payload_bytes: int) -> None:
        """Wait until a message of this size, sent now, would have arrived."""
        await until(self.due_s(payload_bytes))

    async def idle(self) -> None:
        """Wait until no message waits for the bandwidth."""
        while self._free_s > asyncio.get_running_loop().time():
            await until(self._free_s)


class Sender(Generic[Message]):
    """Sends messages in order over a link, those that are due at the same time together.

    `put` never waits. The owner runs `run` in one task.
    """

    def __init__(self, link: EmulatedLink, send: Callable[[list[Message]], Awaitable[None]], bound: int = 1024) -> None:
        self._link = link
        self._send = send
        self._bound = bound
        self._waiting: deque[tuple[float, Message]] = deque()  # with the times at which they are due
        self._filled = asyncio.Event()  # set while messages wait

    def put(self, message: Message, payload_bytes: int) -> None:
        """Queue a message; CapacityError if `bound` messages already wait."""
        if len(self._waiting) >= self._bound:
            raise CapacityError(f"{self._bound} messages already wait to be sent over this link")
        self._waiting.append((self._link.due_s(payload_bytes), message))
        self._filled.set()

    async def run(self) -> None:
        """Send each queued message when it is due, until cancelled or until the connection fails."""
        while True:
            await self._filled.wait()
            await until(self._waiting[0][0])
            if due := self._take_due():
                await self._send(due)

    def _take_due(self) -> list[Message]:
        now_s, due = asyncio.get_running_loop().time(), []
        while self._waiting and self._waiting[0][0] <= now_s:
            due.append(self._waiting.popleft()[1])
        if not self._waiting:
            self._filled.clear()
        return due


async def until(due_s: float) -> None:
    """Sleep until `due_s` on the event loop's clock."""
    wait_s = due_s - asyncio.get_running_loop().time()
    if wait_s > 0:
        await asyncio.sleep(wait_s)
