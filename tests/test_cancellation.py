"""The cancellation of tasks."""

from __future__ import annotations

import asyncio

from resplit.cancellation import cancel_and_wait


async def test_a_task_that_takes_the_first_cancellation_for_a_lost_connection_still_ends() -> None:
    losses = 0

    async def try_again_after_a_loss() -> None:
        nonlocal losses
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                losses += 1
                if losses > 1:
                    raise

    task = asyncio.create_task(try_again_after_a_loss())
    await asyncio.sleep(0)

    async with asyncio.timeout(5):
        await cancel_and_wait([task])

    assert task.cancelled()
    assert losses == 2


async def test_a_task_that_ends_with_an_error_raises_nothing_here() -> None:
    async def fail() -> None:
        raise ValueError

    task = asyncio.create_task(fail())

    await cancel_and_wait([task, asyncio.create_task(asyncio.sleep(60))])

    assert task.done()
    await cancel_and_wait([])
