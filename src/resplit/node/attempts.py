"""Which attempts of which sessions a node still accepts.

A session that lost a node is tried again under a higher attempt number. Messages of its earlier attempts, and of
sessions that have ended, may still arrive afterwards and must be refused.
"""

from __future__ import annotations

import threading

from resplit.errors import CommandRefusedError

_ENDED_REMEMBERED = 4096


class Attempts:
    """The newest attempt seen of each session, and the sessions that ended last. Thread-safe."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}  # of sessions with an attempt above 0
        self._ended: dict[str, None] = {}  # oldest first, at most `_ENDED_REMEMBERED`
        self._lock = threading.Lock()

    def ensure_current(self, session: str, attempt: int) -> None:
        """CommandRefusedError if the session has ended or a later attempt was seen; a new attempt is remembered."""
        with self._lock:
            if session in self._ended:
                raise CommandRefusedError("stale", f"session {session} has ended")
            newest = self._newest.get(session, 0)
            if attempt < newest:
                raise CommandRefusedError("stale", f"attempt {attempt} of session {session}: {newest} has begun")
            if attempt > newest:
                self._newest[session] = attempt

    def end(self, session: str) -> None:
        """Refuse the session from now on."""
        with self._lock:
            self._newest.pop(session, None)
            self._ended[session] = None
            if len(self._ended) > _ENDED_REMEMBERED:
                del self._ended[next(iter(self._ended))]

    def has_ended(self, session: str) -> bool:
        """Whether the session is among those that ended last."""
        return session in self._ended

    def sessions(self) -> set[str]:
        """Sessions with an attempt above 0 that have not ended."""
        with self._lock:
            return set(self._newest)
