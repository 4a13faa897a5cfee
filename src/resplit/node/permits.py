"""The sessions of which a node accepts messages, and what it accepts of each.

Only the controller gives permits. A node keeps nothing of a session without one, so no other member can make it hold
memory for a session that does not exist, or write to one that runs elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from resplit.errors import CommandRefusedError
from resplit.wire.message_limits import MAX_MESSAGE_BYTES
from resplit.wire.permits import Permit

_ENDED_REMEMBERED = 4096
# The gateway sends a session's permits and its first step at the same time, on different ways.
_ARRIVES_WITHIN_S = 5.0
# Of what one member sent. The largest message may wait, but no more beside it.
_MOST_WAITING = 64
_MOST_WAITING_BYTES = MAX_MESSAGE_BYTES


class Permits:
    """The permits by session, and the sessions that ended last.

    The event loop's thread changes them. Other threads may call `covering`, `ensure_current` and `has_ended`. `on_end`
    is called with each session that ends.
    """

    def __init__(self) -> None:
        self.on_end: Callable[[str], None] = lambda session: None
        self._permits: dict[str, Permit] = {}
        self._ended: dict[str, None] = {}  # oldest first, at most `_ENDED_REMEMBERED`
        self._given = asyncio.Event()  # set and replaced at each new session
        self._waiting: defaultdict[str, list[int]] = defaultdict(list)  # sizes in bytes, by sender

    def give(self, session: str, permit: Permit) -> bool:
        """Replace a session's permit. Returns whether an attempt begins with it.

        CommandRefusedError if the session has ended or a later attempt has begun.
        """
        current = self._permits.get(session)
        if session in self._ended or (current and permit.attempt < current.attempt):
            raise self._stale(session, permit.attempt)
        self._permits[session] = permit
        if current is None:
            self._given.set()
            self._given = asyncio.Event()
        return current is None or permit.attempt > current.attempt

    def of(self, session: str, attempt: int) -> Permit:
        """The permit of a session; CommandRefusedError if it has none for this attempt."""
        permit = self._permits.get(session)
        if permit is None or permit.attempt != attempt:
            raise self._stale(session, attempt)
        return permit

    def covering(self, session: str, attempt: int, epoch: int, positions: int) -> Permit | None:
        """The permit for a session's pass in this attempt and epoch that caches so many positions, if it has one."""
        permit = self._permits.get(session)
        if permit is None or permit.attempt != attempt or epoch not in permit.epochs or positions > permit.capacity:
            return None
        return permit

    async def arrival(self, session: str, sender: str, size_bytes: int) -> None:
        """Wait a moment for the first permit of a session, for a step of this size.

        Returns at once if many steps of its sender wait already, or large ones.
        """
        if self.known(session):
            return
        waiting = self._waiting[sender]
        if len(waiting) >= _MOST_WAITING or sum(waiting) + size_bytes > _MOST_WAITING_BYTES:
            return
        waiting.append(size_bytes)
        try:
            async with asyncio.timeout(_ARRIVES_WITHIN_S):
                while not self.known(session):
                    await self._given.wait()
        except TimeoutError:
            pass
        finally:
            waiting.remove(size_bytes)

    def ensure_current(self, session: str, attempt: int) -> None:
        """CommandRefusedError if the session has ended or another attempt has begun.

        A session without a permit passes: the node itself has one while it times blocks.
        """
        permit = self._permits.get(session)
        if session in self._ended or (permit and permit.attempt != attempt):
            raise self._stale(session, attempt)

    def end(self, session: str) -> None:
        """Refuse the session from now on."""
        self._permits.pop(session, None)
        self._ended[session] = None
        if len(self._ended) > _ENDED_REMEMBERED:
            del self._ended[next(iter(self._ended))]
        self.on_end(session)

    def has_ended(self, session: str) -> bool:
        """Whether the session is among those that ended last."""
        return session in self._ended

    def sessions(self) -> set[str]:
        """Sessions with a permit."""
        return set(self._permits)

    def known(self, session: str) -> bool:
        """Whether the session has a permit, or has ended: what it may do is decided."""
        return session in self._permits or session in self._ended

    def _stale(self, session: str, attempt: int) -> CommandRefusedError:
        if session in self._ended:
            return CommandRefusedError("stale", f"session {session} has ended")
        if permit := self._permits.get(session):
            return CommandRefusedError("stale", f"session {session} is in attempt {permit.attempt}, not {attempt}")
        return CommandRefusedError("stale", f"session {session} has not begun here")
