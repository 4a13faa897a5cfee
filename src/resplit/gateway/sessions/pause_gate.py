"""A gate through which passes go. While it is paused, passes under way end and no others begin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

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

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """The context of one pass: it is entered once the gate is open."""
        while self._pauses:
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

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
