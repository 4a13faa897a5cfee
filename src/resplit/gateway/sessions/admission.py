"""Who may hold caches now: so many sessions, so many tokens in all, first come, first served.

Turns away who finds the line full and, where that is asked for, who would be served too late to be of use. Knows
neither requests nor nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from resplit.errors import CapacityError
from resplit.gateway.sessions.wait_forecast import Pace, Work, wait_s

_COME_BACK_S = 2.0  # while no pace is known
# Lines move unevenly. Who is let in and refused later has waited in vain, so the wait is taken for longer at first.
_CAUTION = 1.25
# The pace of late is a mean: about half of all answers take longer than it says.
_MARGIN = 1.1
_LOOK_AGAIN_S = 0.25  # how often it is asked whether one in line can still be served in time


@dataclass(frozen=True)
class Promise:
    """What a request that arrived at `since_s` (event loop's clock) is worth nothing after: `slo_s` from there."""

    since_s: float
    slo_s: float

    @property
    def due_s(self) -> float:
        """The moment (event loop's clock) until which the last token is of use."""
        return self.since_s + self.slo_s


@dataclass(eq=False)
class Place:
    """A request's place, in line and then inside; `turn` is set once its tokens are reserved."""

    prompt_tokens: int
    new_tokens: int
    made: int = 0  # new tokens so far
    turn: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens(self) -> int:
        """Cached tokens that it reserves."""
        return self.prompt_tokens + self.new_tokens


class Admission:
    """Room for `sessions` sessions that reserve `tokens` cached tokens together; `queue` more may wait in line."""

    def __init__(self, sessions: int, tokens: int, queue: int) -> None:
        self._sessions = sessions
        self._tokens = tokens
        self._queue = queue
        self._line: deque[Place] = deque()
        self._inside: set[Place] = set()
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """How many wait in line."""
        return len(self._line)

    async def enter(self, prompt_tokens: int, new_tokens: int, due_s: float, promise: Promise | None = None) -> Place:
        """Reserve room for all these tokens, after those who came before.

        CapacityError where the line is full, or where the pace of late tells that `promise` cannot be kept (None: it
        need not be); TimeoutError where the turn has not come by `due_s` (event loop's clock).
        """
        place = Place(prompt_tokens, new_tokens)
        self._refuse_beyond_the_line(place)
        if promise is not None:
            waits_s = self._wait_s([*self._line, place])
            self._refuse_too_late(place, promise, None if waits_s is None else _CAUTION * waits_s)
        self._line.append(place)
        try:
            self._advance()
            await self._turn(place, due_s, promise)
            self._refuse_too_late(place, promise)
        except BaseException:
            self._withdraw(place)
            raise
        return place

    def made_token(self, place: Place, took_s: float) -> None:
        """A token of a request inside was made; it took so long."""
        now_s = asyncio.get_running_loop().time()
        if place.made:
            self._pace.next_token(now_s, took_s)
        else:
            self._pace.first_token(now_s, place.prompt_tokens, took_s)
        place.made += 1

    def leave(self, place: Place) -> None:
        """Free what `enter` reserved."""
        if place.made:
            self._pace.ended(asyncio.get_running_loop().time(), place.new_tokens, place.made)
        self._inside.remove(place)
        self._advance()

    async def _turn(self, place: Place, due_s: float, promise: Promise | None) -> None:
        """Wait for the turn, as long as an answer from then on would be in time."""
        while not place.turn.is_set():
            if (now_s := asyncio.get_running_loop().time()) >= due_s:
                raise TimeoutError
            self._refuse_too_late(place, promise)
            look_again_s = due_s if promise is None else min(due_s, now_s + _LOOK_AGAIN_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_again_s):
                    await place.turn.wait()

    def _withdraw(self, place: Place) -> None:
        if place in self._inside:  # its turn came in the same moment
            self.leave(place)
        else:
            self._line.remove(place)
            self._advance()

    def _advance(self) -> None:
        while self._line and self._fits(self._line[0]):
            place = self._line.popleft()
            self._inside.add(place)
            place.turn.set()

    def _fits(self, place: Place) -> bool:
        return len(self._inside) < self._sessions and self._reserved + place.tokens <= self._tokens

    @property
    def _reserved(self) -> int:
        return sum(place.tokens for place in self._inside)

    def _refuse_beyond_the_line(self, place: Place) -> None:
        """Where it would have to wait and the line is full."""
        if (self._line or not self._fits(place)) and len(self._line) >= self._queue:
            taken = f"{len(self._inside)} of {self._sessions} sessions run"
            if len(self._inside) < self._sessions:
                taken = f"{self._reserved} of {self._tokens} cached tokens are reserved"
            raise CapacityError(f"{taken}, and {len(self._line)} requests wait already", self._come_back_s(place))

    def _refuse_too_late(self, place: Place, promise: Promise | None, waits_s: float | None = 0.0) -> None:
        """Where a promise cannot be kept by one that waits so long and is served at the pace of late then.

        Whoever is alone is served: without it, nothing would show that the pace is better now.
        """
        service_s = self._service_s(place)
        if promise is None or service_s is None or waits_s is None or not self._inside - {place}:
            return
        left_s = promise.due_s - asyncio.get_running_loop().time()
        if waits_s + _MARGIN * service_s >= left_s:
            raise CapacityError(
                f"the answer would take {waits_s:.1f} s in line and then {service_s:.1f} s, but of the "
                f"{promise.slo_s:g} s within which this class of requests wants it {max(0.0, left_s):.1f} s are left",
                self._come_back_s(place),
            )

    def _come_back_s(self, place: Place) -> float:
        """How long `place` would wait behind all who do now: then they will have had their turn."""
        waits_s = self._wait_s([other for other in self._line if other is not place] + [place])
        return _COME_BACK_S if waits_s is None else waits_s

    def _wait_s(self, line: Sequence[Place]) -> float | None:
        """Seconds until the last one in `line` has its turn; None where no pace is known."""
        inside, waiting = self._work(self._inside - set(line)), self._work(line)
        if inside is None or waiting is None:
            return None
        return wait_s(inside, waiting, self._sessions, self._tokens)

    def _work(self, places: Iterable[Place]) -> list[Work] | None:
        found = [(self._service_s(place), place.tokens) for place in places]
        known = [Work(seconds, tokens) for seconds, tokens in found if seconds is not None]
        return known if len(known) == len(found) else None

    def _service_s(self, place: Place) -> float | None:
        now_s = asyncio.get_running_loop().time()
        return self._pace.service_s(now_s, place.prompt_tokens, place.new_tokens, place.made)
