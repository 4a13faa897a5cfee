"""First come, first served, and never more than there is room for, whoever gives up and when."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resplit.errors import CapacityError
from resplit.gateway.sessions.admission import Admission, Deadline, Reservation

SESSIONS, TOKENS, QUEUE = 3, 100, 6
NEVER_S = float("inf")


@dataclass
class Crowd:
    """Callers of one admission, and who is inside, in the order in which they got in."""

    admission: Admission = field(default_factory=lambda: Admission(SESSIONS, TOKENS, QUEUE))
    inside: dict[int, Reservation] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    asking: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)

    def ask(self, name: int, tokens: int) -> None:
        self.asking[name] = asyncio.create_task(self._enter(name, tokens))
        self.asking[name].add_done_callback(lambda task: self.asking.pop(name))

    async def _enter(self, name: int, tokens: int) -> None:
        try:
            reservation = await self.admission.reserve(tokens - 1, 1, NEVER_S)
        except CapacityError:
            self.refused.add(name)
        else:
            self.inside[name] = reservation
            self.order.append(name)
            assert len(self.inside) <= SESSIONS
            assert sum(reservation.tokens for reservation in self.inside.values()) <= TOKENS

    def leave_first(self) -> None:
        if self.inside:
            name = next(iter(self.inside))
            self.admission.release(self.inside.pop(name))

    def give_up(self, which: int) -> None:
        if self.asking:
            list(self.asking.values())[which % len(self.asking)].cancel()


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


ACTS = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, TOKENS)),
    st.tuples(st.just("leave"), st.just(0)),
    st.tuples(st.just("give up"), st.integers(0, 20)),
    st.tuples(st.just("settle"), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(acts=st.lists(ACTS, max_size=40))
def test_room_is_never_exceeded_nobody_overtakes_and_all_of_it_comes_back(acts: list[tuple[str, int]]) -> None:
    asyncio.run(_play(acts))


async def _play(acts: list[tuple[str, int]]) -> None:
    crowd = Crowd()
    for number, (act, size) in enumerate(acts):
        if act == "ask":
            crowd.ask(number, size)
        elif act == "leave":
            await settle()  # who asks and is let in at once returns before one whose turn has just come
            crowd.leave_first()
        elif act == "give up":
            await settle()
            crowd.give_up(size)
        else:
            await settle()
            assert crowd.admission.waiting == len(crowd.asking) <= QUEUE
    await settle()
    while crowd.inside:
        crowd.leave_first()
        await settle()
    assert not crowd.asking
    assert crowd.order == sorted(crowd.order)
    await asyncio.wait_for(crowd.admission.reserve(TOKENS - 1, 1, NEVER_S), 1)  # all of the room is free again


async def test_when_the_first_in_line_gives_up_the_next_goes_on_at_once() -> None:
    crowd = Crowd()
    crowd.ask(1, 60)
    crowd.ask(2, 90)
    crowd.ask(3, 40)
    await settle()
    assert crowd.order == [1]
    crowd.give_up(0)
    await settle()
    assert crowd.order == [1, 3]


async def test_one_that_gives_up_as_its_turn_comes_takes_no_room() -> None:
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


async def test_a_full_line_is_said_at_once_and_a_turn_that_never_comes_at_the_deadline() -> None:
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


async def test_without_a_line_who_fits_comes_in_and_who_does_not_is_sent_away() -> None:
    admission = Admission(2, 10, 0)
    await admission.reserve(5, 1, NEVER_S)
    with pytest.raises(CapacityError, match="6 of 10 cached tokens are reserved"):
        await admission.reserve(4, 1, NEVER_S)
    await admission.reserve(3, 1, NEVER_S)


def deadline_in(slo_s: float) -> Deadline:
    return Deadline(asyncio.get_running_loop().time(), slo_s)


async def busy(sessions: int = 1, queue: int = 4) -> tuple[Admission, Reservation]:
    """Somebody inside for 10 more of 20 tokens; a prompt of 10 took 0.2 s, each token 0.1 s."""
    admission = Admission(sessions, 1000, queue)
    inside = await admission.reserve(10, 20, NEVER_S)
    for made in range(10):
        admission.made_token(inside, 0.1 if made else 0.2)
    return admission, inside


async def test_what_would_come_too_late_is_refused_at_once_and_told_when_to_come_back() -> None:
    admission, inside = await busy()
    with pytest.raises(
        CapacityError, match=r"1\.2 s in the queue and then 0\.6 s, but only 1\.5 s are left of the 1\.5 s"
    ) as refusal:
        await admission.reserve(
            10, 5, NEVER_S, deadline_in(1.5)
        )  # 1 s in line, a quarter for caution; 0.2 s and 4 times 0.1 s
    assert refusal.value.retry_after_s == pytest.approx(1.0, abs=0.01)
    waiting = asyncio.create_task(admission.reserve(10, 5, NEVER_S, deadline_in(2.0)))
    await settle()
    assert admission.waiting == 1
    admission.release(inside)
    await waiting


async def test_who_waits_until_it_is_too_late_is_refused_then() -> None:
    admission, inside = await busy()
    waiting = asyncio.create_task(admission.reserve(10, 5, NEVER_S, deadline_in(2.0)))
    await settle()
    assert admission.waiting == 1
    begun_s = asyncio.get_running_loop().time()
    with pytest.raises(CapacityError, match=r"0\.0 s in the queue and then 0\.6 s"):
        await asyncio.wait_for(waiting, 5)
    assert 1.0 < asyncio.get_running_loop().time() - begun_s < 3.5  # 2.0 s less 0.6 s of service and a tenth
    assert admission.waiting == 0
    admission.release(inside)


async def test_whoever_asked_for_no_promise_waits_however_late_it_gets() -> None:
    admission, inside = await busy()
    waiting = asyncio.create_task(admission.reserve(500, 400, NEVER_S))
    await settle()
    assert admission.waiting == 1
    admission.release(inside)
    await waiting


async def test_whoever_is_alone_is_served_however_slow_it_was_lately() -> None:
    admission, inside = await busy()
    admission.release(inside)
    await asyncio.wait_for(admission.reserve(10, 20, NEVER_S, deadline_in(0.01)), 1)


async def test_while_nothing_is_known_nobody_is_refused_for_being_late() -> None:
    admission = Admission(1, 1000, 4)
    inside = await admission.reserve(10, 20, NEVER_S)
    waiting = asyncio.create_task(admission.reserve(10, 20, NEVER_S, deadline_in(0.01)))
    await settle()
    assert admission.waiting == 1
    admission.release(inside)
    await waiting


async def test_a_full_line_tells_when_it_will_have_been_served() -> None:
    admission, _ = await busy(queue=2)
    waiting = [asyncio.create_task(admission.reserve(10, 20, NEVER_S)) for _ in range(2)]
    await settle()
    with pytest.raises(CapacityError, match="2 requests wait already") as refusal:
        await admission.reserve(10, 20, NEVER_S)
    # 1 s for the one inside, then 0.2 s and 19 times 0.1 s for each in line.
    assert refusal.value.retry_after_s == pytest.approx(1.0 + 2 * 2.1, abs=0.01)
    for each in waiting:
        each.cancel()
