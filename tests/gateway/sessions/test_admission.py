"""Admission is first come, first served to one client, and fair to several, whichever requests are cancelled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import CapacityError, QueueTimeoutError
from resplit.gateway.sessions.admission import Admission, Deadline, Reservation
from tests.support.properties import examples
from tests.support.simulated_clock import SimulatedClock, run_simulated

SESSIONS, TOKENS, QUEUE = 3, 100, 6
NEVER_S = float("inf")


@dataclass
class Crowd:
    """Callers of one admission: those that run, in the order of admission, those that wait, and those refused."""

    admission: Admission = field(default_factory=lambda: Admission(SESSIONS, TOKENS, QUEUE))
    running: dict[int, Reservation] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    waiting: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)

    def request(self, name: int, tokens: int) -> None:
        self.waiting[name] = asyncio.create_task(self._reserve(name, tokens))
        self.waiting[name].add_done_callback(lambda task: self.waiting.pop(name))

    async def _reserve(self, name: int, tokens: int) -> None:
        try:
            reservation = await self.admission.reserve(tokens - 1, 1, NEVER_S)
        except CapacityError:
            self.refused.add(name)
        else:
            self.running[name] = reservation
            self.order.append(name)
            assert len(self.running) <= SESSIONS
            assert sum(reservation.held for reservation in self.running.values()) <= TOKENS

    def leave_first(self) -> None:
        if self.running:
            name = next(iter(self.running))
            self.admission.release(self.running.pop(name))

    def cancel(self, which: int) -> None:
        if self.waiting:
            list(self.waiting.values())[which % len(self.waiting)].cancel()


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


ACTIONS = st.one_of(
    st.tuples(st.just("request"), st.integers(1, TOKENS)),
    st.tuples(st.just("leave"), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("settle"), st.just(0)),
)


@examples(150)
@given(actions=st.lists(ACTIONS, max_size=40))
def test_limits_hold_no_request_overtakes_another_and_all_room_is_freed(actions: list[tuple[str, int]]) -> None:
    asyncio.run(_play(actions))


async def _play(actions: list[tuple[str, int]]) -> None:
    crowd = Crowd()
    for number, (action, size) in enumerate(actions):
        if action == "request":
            crowd.request(number, size)
            continue
        await settle()
        if action == "leave":
            crowd.leave_first()
        elif action == "cancel":
            crowd.cancel(size)
        else:
            assert crowd.admission.waiting == len(crowd.waiting) <= QUEUE
        await settle()  # a request that is admitted at once returns before one that was just granted
    await settle()
    while crowd.running:
        crowd.leave_first()
        await settle()
    assert not crowd.waiting
    assert crowd.order == sorted(crowd.order)
    await asyncio.wait_for(crowd.admission.reserve(TOKENS - 1, 1, NEVER_S), 1)  # all room is free again


async def test_when_the_first_in_the_queue_is_cancelled_the_next_is_admitted_at_once() -> None:
    crowd = Crowd()
    crowd.request(1, 60)
    crowd.request(2, 90)
    crowd.request(3, 40)
    await settle()
    assert crowd.order == [1]
    crowd.cancel(0)
    await settle()
    assert crowd.order == [1, 3]


async def test_a_request_that_is_cancelled_as_it_is_granted_takes_no_room() -> None:
    admission = Admission(1, 10, 2)
    inside = await admission.reserve(9, 1, NEVER_S)
    waiting = asyncio.create_task(admission.reserve(9, 1, NEVER_S))
    await settle()
    waiting.cancel()
    admission.release(inside)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await admission.reserve(9, 1, NEVER_S)
    assert admission.waiting == 0


async def test_a_full_queue_refuses_at_once_and_a_queued_request_fails_at_its_deadline() -> None:
    admission = Admission(1, 10, 1)
    inside = await admission.reserve(1, 1, NEVER_S)
    waiting = asyncio.create_task(admission.reserve(1, 1, asyncio.get_running_loop().time() + 0.05))
    await settle()
    with pytest.raises(CapacityError, match="1 of 1 sessions run, and 1 requests wait already") as refusal:
        await admission.reserve(1, 1, NEVER_S)
    assert refusal.value.retry_after_s > 0
    with pytest.raises(QueueTimeoutError) as late:
        await waiting
    assert late.value.retry_after_s > 0
    admission.release(inside)
    await admission.reserve(9, 1, NEVER_S)


async def test_without_a_queue_a_request_that_fits_is_admitted_and_others_are_refused() -> None:
    admission = Admission(2, 10, 0)
    await admission.reserve(5, 1, NEVER_S)
    with pytest.raises(CapacityError, match="6 of 10 cached tokens are used"):
        await admission.reserve(4, 1, NEVER_S)
    await admission.reserve(3, 1, NEVER_S)


async def grown(admission: Admission, *sizes: tuple[int, int]) -> list[Reservation]:
    """Requests with so many cached tokens so far, of so many that they may need."""
    found = []
    for used, needed in sizes:
        found.append(await admission.reserve(1, needed - 1, NEVER_S))
        assert admission.grow(found[-1], used, used)
    return found


async def test_a_small_request_does_not_wait_behind_room_that_nobody_uses() -> None:
    admission = Admission(8, 256, 4)
    await grown(admission, (32, 256))
    small = await asyncio.wait_for(admission.reserve(8, 5, NEVER_S), 1)
    assert small.held == 13


async def test_when_room_runs_out_a_session_pauses_until_another_ends() -> None:
    admission = Admission(8, 160, 4)
    first, second = await grown(admission, (48, 112), (48, 112))
    assert admission.grow(first, 64, 64)
    assert not admission.grow(second, 64, 64)
    assert second.paused
    newcomer = asyncio.create_task(admission.reserve(2, 2, NEVER_S))
    await settle()
    assert admission.waiting == 1  # nobody new is admitted while a session is paused
    freed = asyncio.create_task(admission.freed())
    await settle()
    admission.release(first)
    await asyncio.wait_for(freed, 1)
    assert (second.held, second.paused) == (64, False)
    await newcomer


async def test_room_that_is_freed_goes_to_the_oldest_paused_session_first() -> None:
    admission = Admission(8, 112, 4)
    ends, old, young = await grown(admission, (16, 32), (32, 80), (32, 80))
    assert admission.grow(ends, 32, 32)
    assert not admission.grow(young, 64, 64)
    assert not admission.grow(old, 64, 64)
    admission.release(ends)
    assert (old.held, young.held) == (64, 32)


async def test_a_session_gets_less_room_than_it_asks_for_if_that_is_all_that_it_needs_now() -> None:
    admission = Admission(8, 64, 4)
    one, _ = await grown(admission, (32, 64), (16, 16))
    assert admission.grow(one, 33, 64)
    assert one.held == 48


@examples(200)
@given(
    needs=st.lists(st.integers(2, 96), min_size=1, max_size=6),
    turns=st.lists(st.integers(0, 5), max_size=80),
)
def test_whoever_grows_when_one_can_always_finish(needs: list[int], turns: list[int]) -> None:
    asyncio.run(_grow(needs, turns))


async def _grow(needs: list[int], turns: list[int]) -> None:
    admission = Admission(8, 96, 8)
    tasks = [asyncio.create_task(admission.reserve(1, need - 1, NEVER_S)) for need in needs]
    used: dict[Reservation, int] = {}

    async def advance(turn: int | None) -> None:
        """One session adds a position, or every session does; those that are complete end."""
        await settle()
        running = list(admission._running)
        for each in running:
            used.setdefault(each, 1)
        for each in running if turn is None else running[turn : turn + 1]:
            if used[each] == each.tokens:
                admission.release(each)
            elif used[each] < each.held or admission.grow(each, used[each] + 1, used[each] + 1):
                used[each] += 1
        assert sum(each.held for each in admission._running) <= 96
        assert all(used.get(each, 1) <= each.held for each in admission._running)

    for turn in turns:
        await advance(turn)
    for _ in range(sum(needs) + 2 * len(needs)):
        await advance(None)
    await settle()
    assert admission.running == admission.waiting == 0
    await asyncio.gather(*tasks)


@dataclass
class Clients:
    """Requests of clients with names of one letter; `order` has each when it gets room or is refused."""

    admission: Admission
    running: list[Reservation] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def request(self, client: str) -> None:
        self.tasks.append(asyncio.create_task(self._reserve(client)))

    async def _reserve(self, client: str) -> None:
        try:
            self.running.append(await self.admission.reserve(1, 1, NEVER_S, client=client))
            self.order.append(client)
        except CapacityError:
            self.order.append(f"-{client}")

    async def end_first(self) -> None:
        self.admission.release(self.running.pop(0))
        await settle()


async def crowded(admission: Admission, running: str, waiting: str) -> Clients:
    """Requests of clients with names of one letter, which run and wait. `end_first` ends the oldest that runs."""
    crowd = Clients(admission)
    for client in running + waiting:
        crowd.request(client)
    await settle()
    assert "".join(crowd.order) == running
    crowd.order.clear()
    return crowd


@pytest.mark.parametrize(
    ("running", "waiting", "order"),
    [
        ("aaa", "aaaab", "baaaa"),  # one client with many requests does not keep others out
        ("aaa", "aabcaa", "bcaaaa"),
        ("aab", "aab", "aab"),
        ("abc", "cba", "abc"),
        ("aaa", "bcbc", "bcbc"),
    ],
)
async def test_clients_get_room_in_turn(running: str, waiting: str, order: str) -> None:
    admission = Admission(3, 100, 8)
    clients = await crowded(admission, running, waiting)
    for _ in waiting:
        await clients.end_first()
    assert "".join(clients.order) == order


async def test_in_a_full_queue_the_client_with_most_requests_gives_its_last_place_to_one_with_fewer() -> None:
    admission = Admission(2, 100, 3)
    clients = await crowded(admission, "aa", "aaa")
    for newcomer in "bca":
        clients.request(newcomer)
        await settle()
    assert "".join(clients.order) == "-a-a-a"
    for _ in range(3):
        await clients.end_first()
    assert "".join(clients.order) == "-a-a-abac"  # of equals the oldest


async def test_nobody_is_put_out_of_the_queue_for_a_client_with_as_many_requests() -> None:
    admission = Admission(2, 100, 2)
    clients = await crowded(admission, "ab", "ab")
    for newcomer in "ab":
        clients.request(newcomer)
        await settle()
    assert "".join(clients.order) == "-a-b"
    assert admission.waiting == 2


@examples(100)
@given(names=st.lists(st.sampled_from("aaabc"), min_size=1, max_size=20), sessions=st.integers(1, 4))
def test_every_client_ends_however_many_requests_others_have(names: list[str], sessions: int) -> None:
    async def play() -> None:
        admission = Admission(sessions, 100, 20)
        crowd = Clients(admission)
        for client in names:
            crowd.request(client)
        await settle()
        while crowd.running:
            await crowd.end_first()
        await asyncio.gather(*crowd.tasks)
        assert sorted(crowd.order) == sorted(names)
        assert admission.running == admission.waiting == 0

    asyncio.run(play())


async def test_the_forecast_of_a_wait_knows_whose_turn_it_is() -> None:
    admission, _ = await busy(queue=8)
    queued = [asyncio.create_task(admission.reserve(1, 1, NEVER_S)) for _ in range(3)]
    await settle()
    with pytest.raises(CapacityError, match=r"1\.6 s in the queue"):
        await admission.reserve(10, 5, NEVER_S, deadline_in(2.0))
    other = asyncio.create_task(admission.reserve(10, 5, NEVER_S, deadline_in(2.0), client="other"))
    await settle()
    assert not other.done()  # only the request that runs is before it
    for each in [*queued, other]:
        each.cancel()


def deadline_in(slo_s: float) -> Deadline:
    return Deadline(asyncio.get_running_loop().time(), slo_s)


async def busy(sessions: int = 1, queue: int = 4) -> tuple[Admission, Reservation]:
    """One request runs, with 10 of 20 tokens to go; its prompt of 10 took 0.2 s, each token 0.1 s."""
    admission = Admission(sessions, 1000, queue)
    inside = await admission.reserve(10, 20, NEVER_S)
    for made in range(10):
        admission.made_token(inside, 0.1 if made else 0.2)
    return admission, inside


async def test_a_request_that_would_be_late_is_refused_at_once_with_a_time_to_retry() -> None:
    admission, inside = await busy()
    with pytest.raises(
        CapacityError, match=r"1\.2 s in the queue and then 0\.6 s, but only 1\.5 s are left of the 1\.5 s"
    ) as refusal:
        # 1.25 times a wait of 1 s, then 0.2 s and 4 times 0.1 s.
        await admission.reserve(10, 5, NEVER_S, deadline_in(1.5))
    assert refusal.value.retry_after_s == pytest.approx(1.0, abs=0.01)
    waiting = asyncio.create_task(admission.reserve(10, 5, NEVER_S, deadline_in(2.0)))
    await settle()
    assert admission.waiting == 1
    admission.release(inside)
    await waiting


def test_a_queued_request_is_refused_once_it_would_be_late() -> None:
    async def check(clock: SimulatedClock) -> None:
        admission, inside = await busy()
        waiting = asyncio.create_task(admission.reserve(10, 5, NEVER_S, deadline_in(2.0)))
        await settle()
        assert admission.waiting == 1
        with pytest.raises(CapacityError, match=r"0\.0 s in the queue and then 0\.6 s"):
            await asyncio.wait_for(waiting, 5)
        # Late after 1.34 s: 2.0 s less 0.6 s of service and a tenth of that. The forecast is renewed every 0.25 s.
        assert clock.now_s == pytest.approx(1.5)
        assert admission.waiting == 0
        admission.release(inside)

    run_simulated(check)


async def test_a_request_without_a_deadline_waits_however_late_it_gets() -> None:
    admission, inside = await busy()
    waiting = asyncio.create_task(admission.reserve(500, 400, NEVER_S))
    await settle()
    assert admission.waiting == 1
    admission.release(inside)
    await waiting


async def test_a_request_that_runs_alone_is_admitted_however_slow_the_recent_pace() -> None:
    admission, inside = await busy()
    admission.release(inside)
    await asyncio.wait_for(admission.reserve(10, 20, NEVER_S, deadline_in(0.01)), 1)


async def test_no_request_is_refused_as_late_while_no_pace_is_known() -> None:
    admission = Admission(1, 1000, 4)
    inside = await admission.reserve(10, 20, NEVER_S)
    waiting = asyncio.create_task(admission.reserve(10, 20, NEVER_S, deadline_in(0.01)))
    await settle()
    assert admission.waiting == 1
    admission.release(inside)
    await waiting


async def test_the_refusal_of_a_full_queue_says_when_to_retry() -> None:
    admission, _ = await busy(queue=2)
    waiting = [asyncio.create_task(admission.reserve(10, 20, NEVER_S)) for _ in range(2)]
    await settle()
    with pytest.raises(CapacityError, match="2 requests wait already") as refusal:
        await admission.reserve(10, 20, NEVER_S)
    # 1 s for the one that runs, then 0.2 s and 19 times 0.1 s for each in the queue.
    assert refusal.value.retry_after_s == pytest.approx(1.0 + 2 * 2.1, abs=0.01)
    for each in waiting:
        each.cancel()
