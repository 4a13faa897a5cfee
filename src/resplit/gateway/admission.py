"""Who may hold caches now: so many sessions, so many tokens in all, first come, first served.

Knows neither requests nor nodes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from resplit.errors import CapacityError


@dataclass
class _Place:
    """One that waits in line; `turn` is set once its tokens are taken for it."""

    tokens: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class Admission:
    """Room for `sessions` sessions that reserve `tokens` cached tokens together; `queue` more may wait in line."""

    def __init__(self, sessions: int, tokens: int, queue: int) -> None:
        self._free_sessions = sessions
        self._free_tokens = tokens
        self._queue = queue
        self._line: deque[_Place] = deque()

    @property
    def waiting(self) -> int:
        """How many wait in line."""
        return len(self._line)

    async def enter(self, tokens: int, due_s: float) -> None:
        """Reserve `tokens`, after those who came before.

        CapacityError where the line is full; TimeoutError where the turn has not come by `due_s` (event loop's clock).
        """
        must_wait = bool(self._line) or not self._fits(tokens)
        if must_wait and len(self._line) >= self._queue:
            raise CapacityError(f"{len(self._line)} requests wait already", retry_after_s=2.0)
        place = _Place(tokens)
        self._line.append(place)
        self._advance()
        try:
            async with asyncio.timeout_at(due_s):
                await place.turn.wait()
        except (TimeoutError, asyncio.CancelledError):
            if place.turn.is_set():  # its turn came in the same moment
                self.leave(tokens)
            else:
                self._line.remove(place)
                self._advance()
            raise

    def leave(self, tokens: int) -> None:
        """Free what `enter` reserved."""
        self._free_sessions += 1
        self._free_tokens += tokens
        self._advance()

    def _advance(self) -> None:
        while self._line and self._fits(self._line[0].tokens):
            place = self._line.popleft()
            self._free_sessions -= 1
            self._free_tokens -= place.tokens
            place.turn.set()

    def _fits(self, tokens: int) -> bool:
        return self._free_sessions > 0 and tokens <= self._free_tokens
