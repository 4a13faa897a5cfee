"""One stream of events for every open page: the page's state is computed once and shared, while somebody watches.

A stream begins with the event `state` (everything) and goes on with events `change` (the parts that changed). A reader
that is too slow misses changes and then gets the whole state again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import structlog
from pydantic_core import to_json

from resplit.decide import Decision
from resplit.errors import CapacityError
from resplit.live.observer import Observer
from resplit.live.views import RequestView, Sections
from resplit.pass_times import PassTime
from resplit.session_records import SessionRecord

_log = structlog.get_logger(__name__)
PERIOD_S = 0.25
MOST_STREAMS = 16
_QUIET_S = 1.0  # something is sent at least so often: a page that hears nothing says so
_MOST_UNREAD = 8
_RETRY_AFTER_S = 5.0


class PageStreams:
    """The open streams of one cluster's page."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._readers: set[_Reader] = set()
        self._watching: asyncio.Task[None] | None = None
        self._before: Sections | None = None
        self._decided: dict[int, Decision] = {}  # the decisions that were sent, by number
        self._ended: list[RequestView] = []  # requests that were not sent yet
        self._sent_s = 0.0

    def ended(self, record: SessionRecord) -> None:
        """Take the record of a request that ended."""
        self._observer.ended(record)
        if self._readers:
            self._ended.append(self._observer.requests[-1])

    def passed(self, done: PassTime) -> None:
        """Take the times of a pass; nothing is done while nobody watches."""
        if self._readers:
            self._observer.passed(done)

    def check_room(self) -> None:
        """CapacityError if as many streams are open as there may be."""
        if len(self._readers) >= MOST_STREAMS:
            raise CapacityError(f"{MOST_STREAMS} pages are open already; close one of them", _RETRY_AFTER_S)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, until `close` or until the reader leaves."""
        self.check_room()
        reader = _Reader()
        self._readers.add(reader)
        try:
            if self._watching is None:
                self._watching = asyncio.create_task(self._watch(), name="live page")
            yield self._state()
            while (message := await reader.unread.get()) != b"":
                if reader.has_missed and reader.unread.empty():
                    reader.has_missed, message = False, self._state()
                yield message
        finally:
            self._readers.discard(reader)
            if not self._readers:
                self._stop()

    def close(self) -> None:
        """End all streams."""
        for reader in self._readers:
            if reader.unread.full():
                reader.unread.get_nowait()
            reader.unread.put_nowait(b"")

    def _stop(self) -> None:
        if self._watching:
            self._watching.cancel()
        self._watching, self._before = None, None
        self._decided.clear()
        self._ended.clear()

    async def _watch(self) -> None:
        """Send what changed to all readers. A defect here ends the streams, not the service."""
        try:
            while True:
                if message := self._changes():
                    for reader in self._readers:
                        reader.send(message)
                await asyncio.sleep(PERIOD_S)
        except Exception:
            _log.exception("the live page's streams end because of a defect")
            self._watching = None
            self.close()

    def _changes(self) -> bytes:
        """The event with what changed since the last call; empty if nothing did and readers heard something lately."""
        now = self._observer.sections()
        changed = now.changed_since(self._before)
        self._before = now
        if decisions := self._new_decisions():
            changed["decisions"] = decisions
        if self._ended:
            changed["requests"], self._ended = self._ended, []
        if not changed and time.monotonic() - self._sent_s < _QUIET_S:
            return b""
        self._sent_s = time.monotonic()
        return _event("change", changed)

    def _new_decisions(self) -> list[Decision]:
        """Decisions that were not sent yet or whose outcome has changed: sessions resume after a recovery."""
        known = self._decided
        since = None if not known else max(0, max(known) - 3)
        found = {decision.id or 0: decision for decision in self._observer.decisions(since)}
        new = [decision for number, decision in found.items() if known.get(number) != decision]
        self._decided = {**known, **found} if len(known) < 200 else found
        return new

    def _state(self) -> bytes:
        sections = vars(self._observer.sections())
        lists = {"decisions": self._observer.decisions(None), "requests": list(self._observer.requests)}
        return _event("state", {**sections, **lists})


class _Reader:
    """An open page: events that it has not read yet, and whether it was too slow for some."""

    def __init__(self) -> None:
        self.unread: asyncio.Queue[bytes] = asyncio.Queue(_MOST_UNREAD)
        self.has_missed = False

    def send(self, message: bytes) -> None:
        if self.unread.full():
            self.has_missed = True
        else:
            self.unread.put_nowait(message)


def _event(name: str, content: dict[str, Any]) -> bytes:
    body = to_json({"now_s": time.time(), **content}, inf_nan_mode="null")
    return b"event: " + name.encode() + b"\ndata: " + body + b"\n\n"
