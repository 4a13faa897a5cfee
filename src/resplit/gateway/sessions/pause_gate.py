"""A gate through which passes go. While it is paused, passes under way end and no others begin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from resplit.errors import CapacityError


class PauseGate:
    """Open unless it is paused; several callers may pause it at once."""

    def __init__(self) -> None:
        self._pauses = 0
        self._inside = 0  # passes under way
        self._open = asyncio.Event()
        self._empty = asyncio.Event()
        self._open.set()
        self._empty.set()

    @property
    def is_paused(self) -> bool:
        """Whether no pass may begin now."""
        return self._pauses > 0

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """The context of one pass: it is entered once the gate is open."""
        while self._pauses:
            await self._open.wait()
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def stay(self) -> Callable[[object], None]:
        """Within `passing`: count as one more pass under way, which ends when the result is called."""
        self._enter()
        return lambda ended: self._leave()

    @contextlib.asynccontextmanager
    async def paused(self, within_s: float) -> AsyncIterator[None]:
        """A context in which no pass is under way; CapacityError if passes do not end within `within_s` seconds."""
        self._pauses += 1
        self._open.clear()
        try:
            try:
                await asyncio.wait_for(self._empty.wait(), within_s)
            except TimeoutError:
                raise CapacityError(f"{self._inside} passes have not ended within {within_s:g} s") from None
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._open.set()

    def _enter(self) -> None:
        self._inside += 1
        self._empty.clear()

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()
