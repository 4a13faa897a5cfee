"""A gate that passes go through, which can be held shut: those inside end, no others begin.

Knows nothing of what passes are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from resplit.errors import CapacityError


class PauseGate:
    """Open unless somebody holds it; several may at once."""

    def __init__(self) -> None:
        self._holders = 0
        self._inside = 0
        self._open = asyncio.Event()
        self._empty = asyncio.Event()
        self._open.set()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """One pass: begins once the gate is open."""
        while self._holders:
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
        """Nothing is inside; CapacityError where what was has not ended `within_s` seconds."""
        self._holders += 1
        self._open.clear()
        try:
            try:
                await asyncio.wait_for(self._empty.wait(), within_s)
            except TimeoutError:
                raise CapacityError(f"{self._inside} passes have not ended within {within_s:g} s") from None
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._open.set()
