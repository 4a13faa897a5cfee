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
class Deadline:
    """What a request that arrived at `since_s` (event loop's clock) is worth nothing after: `slo_s` from there."""

    since_s: float
    slo_s: float

    @property
    def due_s(self) -> float:
        """The moment (event loop's clock) until which the last token is of use."""
        return self.since_s + self.slo_s


@dataclass(eq=False)
class Reservation:
    """A request's reservation, in line and then inside; `turn` is set once its tokens are reserved."""

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
        self._line: deque[Reservation] = deque()
        self._inside: set[Reservation] = set()
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """How many wait in line."""
        return len(self._line)

    async def reserve(
        self, prompt_tokens: int, new_tokens: int, due_s: float, deadline: Deadline | None = None
    ) -> Reservation:
        """Reserve room for all these tokens, after those who came before.

        CapacityError where the line is full, or where the pace of late tells that `deadline` cannot be kept (None: it
        need not be); TimeoutError where the turn has not come by `due_s` (event loop's clock).
        """
        reservation = Reservation(prompt_tokens, new_tokens)
        self._refuse_beyond_the_line(reservation)
        if deadline is not None:
            waits_s = self._wait_s([*self._line, reservation])
            self._refuse_too_late(reservation, deadline, None if waits_s is None else _CAUTION * waits_s)
        self._line.append(reservation)
        try:
            self._advance()
            await self._turn(reservation, due_s, deadline)
            self._refuse_too_late(reservation, deadline)
        except BaseException:
            self._withdraw(reservation)
            raise
        return reservation

    def made_token(self, reservation: Reservation, took_s: float) -> None:
        """A token of a request inside was made; it took so long."""
        now_s = asyncio.get_running_loop().time()
        if reservation.made:
            self._pace.next_token(now_s, took_s)
        else:
            self._pace.first_token(now_s, reservation.prompt_tokens, took_s)
        reservation.made += 1

    def leave(self, reservation: Reservation) -> None:
        """Free what `enter` reserved."""
        if reservation.made:
            self._pace.ended(asyncio.get_running_loop().time(), reservation.new_tokens, reservation.made)
        self._inside.remove(reservation)
        self._advance()

    async def _turn(self, reservation: Reservation, due_s: float, deadline: Deadline | None) -> None:
        """Wait for the turn, as long as an answer from then on would be in time."""
        while not reservation.turn.is_set():
            if (now_s := asyncio.get_running_loop().time()) >= due_s:
                raise TimeoutError
            self._refuse_too_late(reservation, deadline)
            look_again_s = due_s if deadline is None else min(due_s, now_s + _LOOK_AGAIN_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_again_s):
                    await reservation.turn.wait()

    def _withdraw(self, reservation: Reservation) -> None:
        if reservation in self._inside:  # its turn came in the same moment
            self.leave(reservation)
        else:
            self._line.remove(reservation)
            self._advance()

    def _advance(self) -> None:
        while self._line and self._fits(self._line[0]):
            reservation = self._line.popleft()
            self._inside.add(reservation)
            reservation.turn.set()

    def _fits(self, reservation: Reservation) -> bool:
        return len(self._inside) < self._sessions and self._reserved + reservation.tokens <= self._tokens

    @property
    def _reserved(self) -> int:
        return sum(reservation.tokens for reservation in self._inside)

    def _refuse_beyond_the_line(self, reservation: Reservation) -> None:
        """Where it would have to wait and the line is full."""
        if (self._line or not self._fits(reservation)) and len(self._line) >= self._queue:
            taken = f"{len(self._inside)} of {self._sessions} sessions run"
            if len(self._inside) < self._sessions:
                taken = f"{self._reserved} of {self._tokens} cached tokens are reserved"
            raise CapacityError(f"{taken}, and {len(self._line)} requests wait already", self._come_back_s(reservation))

    def _refuse_too_late(
        self, reservation: Reservation, deadline: Deadline | None, waits_s: float | None = 0.0
    ) -> None:
        """Where a deadline cannot be kept by one that waits so long and is served at the pace of late then.

        Whoever is alone is served: without it, nothing would show that the pace is better now.
        """
        service_s = self._service_s(reservation)
        if deadline is None or service_s is None or waits_s is None or not self._inside - {reservation}:
            return
        left_s = deadline.due_s - asyncio.get_running_loop().time()
        if waits_s + _MARGIN * service_s >= left_s:
            raise CapacityError(
                f"the answer would take {waits_s:.1f} s in line and then {service_s:.1f} s, but of the "
                f"{deadline.slo_s:g} s within which this class of requests wants it {max(0.0, left_s):.1f} s are left",
                self._come_back_s(reservation),
            )

    def _come_back_s(self, reservation: Reservation) -> float:
        """How long `reservation` would wait behind all who do now: then they will have had their turn."""
        waits_s = self._wait_s([other for other in self._line if other is not reservation] + [reservation])
        return _COME_BACK_S if waits_s is None else waits_s

    def _wait_s(self, line: Sequence[Reservation]) -> float | None:
        """Seconds until the last one in `line` has its turn; None where no pace is known."""
        inside, waiting = self._work(self._inside - set(line)), self._work(line)
        if inside is None or waiting is None:
            return None
        return wait_s(inside, waiting, self._sessions, self._tokens)

    def _work(self, reservations: Iterable[Reservation]) -> list[Work] | None:
        found = [(self._service_s(reservation), reservation.tokens) for reservation in reservations]
        known = [Work(seconds, tokens) for seconds, tokens in found if seconds is not None]
        return known if len(known) == len(found) else None

    def _service_s(self, reservation: Reservation) -> float | None:
        now_s = asyncio.get_running_loop().time()
        return self._pace.service_s(now_s, reservation.prompt_tokens, reservation.new_tokens, reservation.made)
