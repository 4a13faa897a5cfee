"""Admission: gives sessions room for their caches as they use it, in turn to each client.

Of those that wait, a request of the client with the fewest running sessions is next, and of equals the oldest one. So
one client alone is served first come, first served, and one with a hundred requests does not keep others out.

A session gets more room as it grows, as long as all running ones can still finish, one after another (the banker's
algorithm, Dijkstra 1965). Otherwise it pauses, with its caches, until others have ended. Nobody new is admitted then.

Refuses a request if the queue is full; but a client that has fewer requests than another takes the place of the other's
last one. For classes with `shed_late`, it also refuses a request if its answer would be late according to the forecast.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from resplit.errors import CapacityError, QueueTimeoutError
from resplit.gateway.sessions.wait_forecast import Pace, Work, wait_s
from resplit.model.room import cache_room

_RETRY_AFTER_S = 2.0  # while no pace is known
# On arrival, the forecast of the wait is multiplied by this: queues move unevenly, and a request that is refused only
# later has waited in vain.
WAIT_FACTOR = 1.25
# The forecast of the service time is multiplied by this: it is a mean, so about half of all answers take longer.
SERVICE_FACTOR = 1.1
CHECK_EVERY_S = 0.25  # how often the forecast of a queued request is renewed


@dataclass(frozen=True)
class Deadline:
    """The service objective of a request: its last token within `slo_s` of its arrival (event loop's clock)."""

    arrival_s: float
    slo_s: float

    @property
    def due_s(self) -> float:
        """The time (event loop's clock) after which the last token is late."""
        return self.arrival_s + self.slo_s


@dataclass(eq=False)
class Reservation:
    """A client's request and its share of the cached tokens; it is queued until it is `settled`.

    It has room for `held` tokens now, and wants room for `wanted` (more than `held`: it is paused).
    """

    prompt_tokens: int
    new_tokens: int
    client: str = ""
    made: int = 0  # new tokens so far
    held: int = 0
    wanted: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # it runs, or another took its place in the queue
    refusal: CapacityError | None = None

    def __post_init__(self) -> None:
        self.wanted = self.room(self.prompt_tokens + 1)

    @property
    def tokens(self) -> int:
        """The cached tokens that it may need in the end: prompt and new tokens together."""
        return self.prompt_tokens + self.new_tokens

    @property
    def paused(self) -> bool:
        """Whether it wants more room than it has."""
        return self.wanted > self.held

    def room(self, positions: int) -> int:
        """The room that so many cached positions take."""
        return cache_room(positions, self.tokens)


class Admission:
    """Room for `sessions` sessions and for `tokens` cached tokens in all; at most `queue` more requests wait."""

    def __init__(self, sessions: int, tokens: int, queue: int) -> None:
        self._sessions = sessions
        self._tokens = tokens
        self._queue = queue
        self._waiting: list[Reservation] = []  # in order of arrival; the one whose turn it is does not fit
        self._running: dict[Reservation, None] = {}  # oldest first; within both limits at all times
        self._freed = asyncio.Event()  # set and replaced whenever a session gets more room or ends
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests run."""
        return len(self._running)

    @property
    def reserved_tokens(self) -> int:
        """The cached tokens for which running requests have room."""
        return sum(reservation.held for reservation in self._running)

    async def reserve(
        self, prompt_tokens: int, new_tokens: int, due_s: float, deadline: Deadline | None = None, client: str = ""
    ) -> Reservation:
        """Reserve room for these tokens when it is the turn of `client`.

        CapacityError if the queue is full, or if the forecast says that the answer would miss `deadline` (None: there
        is none). QueueTimeoutError if there is no room before `due_s` (event loop's clock).
        """
        reservation = Reservation(prompt_tokens, new_tokens, client)
        if deadline is not None:
            before = itertools.takewhile(lambda each: each is not reservation, self._in_turn(reservation))
            waits_s = self._wait_s([*before, reservation])
            self._check_deadline(reservation, deadline, None if waits_s is None else WAIT_FACTOR * waits_s)
        self._take_place(reservation)
        self._waiting.append(reservation)
        try:
            self._advance()
            await self._until_granted(reservation, due_s, deadline)
            self._check_deadline(reservation, deadline)
        except BaseException:
            self._withdraw(reservation)
            raise
        return reservation

    def tokens_within(self, prompt_tokens: int, seconds: float) -> float:
        """How many new tokens a request gets in so many seconds at the recent pace; infinite while none is known."""
        return self._pace.tokens_within(asyncio.get_running_loop().time(), prompt_tokens, seconds)

    def made_token(self, reservation: Reservation, took_s: float) -> None:
        """Record that a running request got a token after `took_s`: the forecast is based on these times."""
        now_s = asyncio.get_running_loop().time()
        if reservation.made:
            self._pace.next_token(now_s, took_s)
        else:
            self._pace.first_token(now_s, reservation.prompt_tokens, took_s)
        reservation.made += 1

    def release(self, reservation: Reservation) -> None:
        """Free the room of a running request."""
        if reservation.made:
            self._pace.ended(asyncio.get_running_loop().time(), reservation.new_tokens, reservation.made)
        del self._running[reservation]
        self._advance()

    def grow(self, reservation: Reservation, least: int, most: int) -> bool:
        """Give a running request room for `most` cached positions, or at least for `least`.

        False if there is no room for these: the request must wait for others to end, and is paused.
        """
        for positions in (most, least):
            reservation.wanted = max(reservation.held, reservation.room(positions))
            if self._grant(reservation):
                return True
        return False

    async def freed(self) -> None:
        """Wait until a session ends or one that was paused gets room."""
        await self._freed.wait()

    def _grant(self, reservation: Reservation) -> bool:
        """Give a request the room that it wants if all can finish then."""
        if reservation.paused:
            if not self._can_finish(reservation):
                return False
            reservation.held = reservation.wanted
        return True

    def _can_finish(self, growing: Reservation) -> bool:
        """Whether all that run, and `growing` with the room that it wants, can get all their room one after another."""
        left = self._tokens - growing.wanted
        needs = [(growing.tokens - growing.wanted, growing.wanted)]
        for each in self._running:
            if each is not growing:
                left -= each.held
                needs.append((each.tokens - each.held, each.held))
        for need, held in sorted(needs):
            if need > left:
                return False
            left += held
        return left >= 0

    async def _until_granted(self, reservation: Reservation, due_s: float, deadline: Deadline | None) -> None:
        """Wait for room; QueueTimeoutError at `due_s`, CapacityError once the answer would be late."""
        while not reservation.settled.is_set():
            if (now_s := asyncio.get_running_loop().time()) >= due_s:
                raise QueueTimeoutError(self._retry_after_s(reservation))
            self._check_deadline(reservation, deadline)
            check_s = due_s if deadline is None else min(due_s, now_s + CHECK_EVERY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(check_s):
                    await reservation.settled.wait()
        if reservation.refusal:
            raise reservation.refusal

    def _withdraw(self, reservation: Reservation) -> None:
        if reservation in self._running:  # it was granted at the same moment
            self.release(reservation)
        elif reservation in self._waiting:
            self._waiting.remove(reservation)
            self._advance()

    def _advance(self) -> None:
        """Give room that was freed to paused requests, the oldest first, and then to those that wait."""
        for paused in self._running:
            self._grant(paused)
        self._freed.set()
        self._freed = asyncio.Event()
        while (reservation := next(self._in_turn(), None)) and self._fits(reservation):
            self._waiting.remove(reservation)
            reservation.held = reservation.wanted
            self._running[reservation] = None
            reservation.settled.set()

    def _in_turn(self, *newcomers: Reservation) -> Iterator[Reservation]:
        """Those that wait, and `newcomers`, in the order in which they are admitted if nobody else comes or ends."""
        running, left = Counter(each.client for each in self._running), [*self._waiting, *newcomers]
        while left:
            following = min(left, key=lambda each: running[each.client])  # of equals the first
            left.remove(following)
            running[following.client] += 1
            yield following

    def _fits(self, reservation: Reservation) -> bool:
        if len(self._running) >= self._sessions or any(each.paused for each in self._running):
            return False
        return self._can_finish(reservation)

    def _take_place(self, reservation: Reservation) -> None:
        """Make sure of a place in the queue if the request has to wait; CapacityError if there is none for it."""
        if len(self._waiting) < self._queue or (not self._waiting and self._fits(reservation)):
            return
        taken = f"{len(self._running)} of {self._sessions} sessions run"
        if len(self._running) < self._sessions:
            taken = f"{self.reserved_tokens} of {self._tokens} cached tokens are used"
        refused = self._last_of_greediest(reservation) or reservation
        refusal = CapacityError(
            f"{taken}, and {len(self._waiting)} requests wait already", self._retry_after_s(refused)
        )
        if refused is reservation:
            raise refusal
        self._waiting.remove(refused)
        refused.refusal = refusal
        refused.settled.set()

    def _last_of_greediest(self, newcomer: Reservation) -> Reservation | None:
        """The last one in the queue of the client with the most requests; None if the newcomer's has about as many."""
        requests = Counter(each.client for each in (*self._running, *self._waiting))
        last = max(reversed(self._waiting), key=lambda each: requests[each.client], default=None)
        return last if last and requests[last.client] > requests[newcomer.client] + 1 else None

    def _check_deadline(self, reservation: Reservation, deadline: Deadline | None, waits_s: float | None = 0.0) -> None:
        """CapacityError if the request would be late when it waits for `waits_s` and is then served at the recent pace.

        A request that would run alone is always served: otherwise nothing would show that the pace has improved.
        """
        service_s = self._service_s(reservation)
        if deadline is None or service_s is None or waits_s is None or not self._running.keys() - {reservation}:
            return
        left_s = deadline.due_s - asyncio.get_running_loop().time()
        if waits_s + SERVICE_FACTOR * service_s >= left_s:
            raise CapacityError(
                f"the answer would take {waits_s:.1f} s in the queue and then {service_s:.1f} s, but only "
                f"{max(0.0, left_s):.1f} s are left of the {deadline.slo_s:g} s in which this class must be answered",
                self._retry_after_s(reservation),
            )

    def _retry_after_s(self, reservation: Reservation) -> float:
        """How long `reservation` would wait behind all requests that wait now."""
        waits_s = self._wait_s([other for other in self._waiting if other is not reservation] + [reservation])
        return _RETRY_AFTER_S if waits_s is None else waits_s

    def _wait_s(self, queue: Sequence[Reservation]) -> float | None:
        """Seconds until the last one in `queue` has room; None while no pace is known."""
        running, waiting = self._work(self._running.keys() - set(queue)), self._work(queue)
        if running is None or waiting is None:
            return None
        return wait_s(running, waiting, self._sessions, self._tokens)

    def _work(self, reservations: Iterable[Reservation]) -> list[Work] | None:
        found = [(self._service_s(reservation), reservation.wanted) for reservation in reservations]
        known = [Work(seconds, tokens) for seconds, tokens in found if seconds is not None]
        return known if len(known) == len(found) else None

    def _service_s(self, reservation: Reservation) -> float | None:
        now_s = asyncio.get_running_loop().time()
        return self._pace.service_s(now_s, reservation.prompt_tokens, reservation.new_tokens, reservation.made)
