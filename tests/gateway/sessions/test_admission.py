"""Admission is first come, first served within its limits, whichever requests are cancelled and when."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import CapacityError
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
            assert sum(reservation.tokens for reservation in self.running.values()) <= TOKENS

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
        elif action == "leave":
            await settle()  # a request that is admitted at once returns before one that was just granted
            crowd.leave_first()
        elif action == "cancel":
            await settle()
            crowd.cancel(size)
        else:
            await settle()
            assert crowd.admission.waiting == len(crowd.waiting) <= QUEUE
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
    with pytest.raises(TimeoutError):
        await waiting
    admission.release(inside)
    await admission.reserve(9, 1, NEVER_S)


async def test_without_a_queue_a_request_that_fits_is_admitted_and_others_are_refused() -> None:
    admission = Admission(2, 10, 0)
    await admission.reserve(5, 1, NEVER_S)
    with pytest.raises(CapacityError, match="6 of 10 cached tokens are reserved"):
        await admission.reserve(4, 1, NEVER_S)
    await admission.reserve(3, 1, NEVER_S)


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
