"""While a gate is paused, passes under way end and no others begin."""

from __future__ import annotations

import asyncio

import pytest

from resplit.errors import CapacityError
from resplit.gateway.sessions.pause_gate import PauseGate


async def test_a_pause_waits_for_the_pass_under_way_and_delays_the_next_one() -> None:
    gate, leave, order = PauseGate(), asyncio.Event(), list[str]()

    async def first() -> None:
        async with gate.passing():
            await leave.wait()
            order.append("first ends")

    async def second() -> None:
        async with gate.passing():
            order.append("second")

    async def pause() -> None:
        async with gate.paused(5):
            order.append("paused")
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for each in (first, pause, second):
            tasks.create_task(each())
            await asyncio.sleep(0)
        leave.set()
    assert order == ["first ends", "paused", "second"]


async def test_the_gate_opens_when_the_last_of_several_pauses_ends() -> None:
    gate = PauseGate()
    async with gate.paused(1):
        async with gate.paused(1):
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), gate.passing():
                pass
    async with asyncio.timeout(1), gate.passing():
        pass


async def test_a_pause_gives_up_on_a_pass_that_does_not_end_and_lets_others_through() -> None:
    gate = PauseGate()
    async with gate.passing():
        with pytest.raises(CapacityError, match="1 passes have not ended within"):
            async with gate.paused(0.01):
                pass
        async with asyncio.timeout(1), gate.passing():
            pass
