"""First come, first served, and never more than there is room for, whoever gives up and when."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resplit.errors import CapacityError
from resplit.gateway.admission import Admission

SESSIONS, TOKENS, QUEUE = 3, 100, 6
NEVER_S = float("inf")


@dataclass
class Crowd:
    """Callers of one admission, and who is inside, in the order in which they got in."""

    admission: Admission = field(default_factory=lambda: Admission(SESSIONS, TOKENS, QUEUE))
    inside: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    asking: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)

    def ask(self, name: int, tokens: int) -> None:
        self.asking[name] = asyncio.create_task(self._enter(name, tokens))
        self.asking[name].add_done_callback(lambda task: self.asking.pop(name))

    async def _enter(self, name: int, tokens: int) -> None:
        try:
            await self.admission.enter(tokens, NEVER_S)
        except CapacityError:
            self.refused.add(name)
        else:
            self.inside[name] = tokens
            self.order.append(name)
            assert len(self.inside) <= SESSIONS
            assert sum(self.inside.values()) <= TOKENS

    def leave_first(self) -> None:
        if self.inside:
            name = next(iter(self.inside))
            self.admission.leave(self.inside.pop(name))

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
            crowd.leave_first()
        elif act == "give up":
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
    await asyncio.wait_for(crowd.admission.enter(TOKENS, NEVER_S), 1)  # all of the room is free again


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
    await admission.enter(10, NEVER_S)
    waiting = asyncio.create_task(admission.enter(10, NEVER_S))
    await settle()
    waiting.cancel()
    admission.leave(10)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await admission.enter(10, NEVER_S)
    assert admission.waiting == 0


async def test_a_full_line_is_said_at_once_and_a_turn_that_never_comes_at_the_deadline() -> None:
    admission = Admission(1, 10, 1)
    await admission.enter(1, NEVER_S)
    waiting = asyncio.create_task(admission.enter(1, asyncio.get_running_loop().time() + 0.05))
    await settle()
    with pytest.raises(CapacityError, match="1 requests wait already") as refusal:
        await admission.enter(1, NEVER_S)
    assert refusal.value.retry_after_s > 0
    with pytest.raises(TimeoutError):
        await waiting
    admission.leave(1)
    await admission.enter(10, NEVER_S)


async def test_without_a_line_who_fits_comes_in_and_who_does_not_is_sent_away() -> None:
    admission = Admission(2, 10, 0)
    await admission.enter(6, NEVER_S)
    with pytest.raises(CapacityError):
        await admission.enter(5, NEVER_S)
    await admission.enter(4, NEVER_S)
