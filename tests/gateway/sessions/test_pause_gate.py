"""A gate that is held: what is inside ends, nothing else begins."""

from __future__ import annotations

import asyncio

import pytest

from resplit.errors import CapacityError
from resplit.gateway.sessions.pause_gate import PauseGate


async def test_who_holds_it_waits_for_those_inside_and_keeps_out_the_others() -> None:
    gate, leave, order = PauseGate(), asyncio.Event(), list[str]()

    async def first() -> None:
        async with gate.passing():
            await leave.wait()
            order.append("first ends")

    async def second() -> None:
        async with gate.passing():
            order.append("second")

    async def hold() -> None:
        async with gate.paused(5):
            order.append("held")
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for each in (first, hold, second):
            tasks.create_task(each())
            await asyncio.sleep(0)
        leave.set()
    assert order == ["first ends", "held", "second"]


async def test_it_opens_when_the_last_of_several_lets_go() -> None:
    gate = PauseGate()
    async with gate.paused(1):
        async with gate.paused(1):
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), gate.passing():
                pass
    async with asyncio.timeout(1), gate.passing():
        pass


async def test_a_pass_that_does_not_end_is_not_waited_for_and_keeps_nobody_out() -> None:
    gate = PauseGate()
    async with gate.passing():
        with pytest.raises(CapacityError, match="1 passes have not ended within"):
            async with gate.paused(0.01):
                pass
        async with asyncio.timeout(1), gate.passing():
            pass
