"""Admission in simulated time: the rules of `gateway/sessions/admission.py`, with its forecast.

It keeps room for sessions and cached tokens, first come, first served, and refuses what would wait in vain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from resplit.config import LimitsConfig
from resplit.gateway.sessions.admission import CHECK_EVERY_S, SERVICE_FACTOR, WAIT_FACTOR
from resplit.gateway.sessions.wait_forecast import Pace, Work, wait_s
from resplit.simulate.agenda import Agenda

__all__ = ["Place", "SimulatedAdmission"]


@dataclass(eq=False)
class Place:
    """A request's place in the line, and then its reservation. `late_s` is when its answer is late, or None.

    `start` is called when it has room, `refuse` if it will never have any.
    """

    prompt_tokens: int
    new_tokens: int
    late_s: float | None
    start: Callable[[], None]
    refuse: Callable[[], None]
    made: int = 0

    @property
    def tokens(self) -> int:
        """The cached tokens that are reserved."""
        return self.prompt_tokens + self.new_tokens


class SimulatedAdmission:
    """Room for `limits.sessions` sessions and `kv_tokens` cached tokens; at most `limits.queue` requests wait."""

    def __init__(self, limits: LimitsConfig, kv_tokens: int, agenda: Agenda) -> None:
        self._limits = limits
        self._kv_tokens = kv_tokens
        self._agenda = agenda
        self._waiting: deque[Place] = deque()
        self._running: dict[Place, None] = {}  # a set in order
        self._reserved = 0
        self._pace = Pace()

    def request(self, place: Place) -> None:
        """Give a request room now or later, or refuse it."""
        if (self._waiting or not self._fits(place)) and len(self._waiting) >= self._limits.queue:
            place.refuse()
            return
        if place.late_s is not None:
            waits_s = self._wait_s([*self._waiting, place])
            if waits_s is not None and self._would_be_late(place, WAIT_FACTOR * waits_s):
                place.refuse()
                return
        self._waiting.append(place)
        self._advance()
        if place.late_s is not None and place not in self._running:
            self._agenda.after(CHECK_EVERY_S, self._check, place)

    def leave(self, place: Place) -> None:
        """A request ends, or leaves the line."""
        if place in self._running:
            if place.made:
                self._pace.ended(self._agenda.now_s, place.new_tokens, place.made)
            del self._running[place]
            self._reserved -= place.tokens
        else:
            self._waiting.remove(place)
        self._advance()

    def made_token(self, place: Place, took_s: float) -> None:
        """Note that a running request got a token after `took_s`: the forecast is based on these times."""
        if place.made:
            self._pace.next_token(self._agenda.now_s, took_s)
        else:
            self._pace.first_token(self._agenda.now_s, place.prompt_tokens, took_s)
        place.made += 1

    def _advance(self) -> None:
        while self._waiting and self._fits(self._waiting[0]):
            place = self._waiting.popleft()
            if place.late_s is not None and self._would_be_late(place):
                place.refuse()
                continue
            self._running[place] = None
            self._reserved += place.tokens
            place.start()

    def _check(self, place: Place) -> None:
        """Refuse a request in the line once its answer would be late."""
        if place not in self._waiting:
            return
        if self._would_be_late(place):
            self._waiting.remove(place)
            place.refuse()
            self._advance()
        else:
            self._agenda.after(CHECK_EVERY_S, self._check, place)

    def _fits(self, place: Place) -> bool:
        room = self._reserved + place.tokens <= self._kv_tokens
        return room and len(self._running) < self._limits.sessions

    def _would_be_late(self, place: Place, waits_s: float = 0.0) -> bool:
        """Whether the answer comes too late after `waits_s` in the line. One that would run alone never does."""
        service_s = self._service_s(place)
        if place.late_s is None or service_s is None or not self._running:
            return False
        return self._agenda.now_s + waits_s + SERVICE_FACTOR * service_s >= place.late_s

    def _wait_s(self, queue: Sequence[Place]) -> float | None:
        running, waiting = self._work(self._running), self._work(queue)
        if running is None or waiting is None:
            return None
        return wait_s(running, waiting, self._limits.sessions, self._kv_tokens)

    def _work(self, places: Iterable[Place]) -> list[Work] | None:
        work = [(self._service_s(place), place.tokens) for place in places]
        known = [Work(seconds, tokens) for seconds, tokens in work if seconds is not None]
        return known if len(known) == len(work) else None

    def _service_s(self, place: Place) -> float | None:
        return self._pace.service_s(self._agenda.now_s, place.prompt_tokens, place.new_tokens, place.made)
