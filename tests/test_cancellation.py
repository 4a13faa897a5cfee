from __future__ import annotations

import asyncio

from resplit.cancellation import cancel_and_wait


async def test_a_task_that_takes_a_cancellation_for_a_loss_ends_all_the_same() -> None:
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


async def test_what_a_task_ends_with_is_nobodys_concern() -> None:
    async def fail() -> None:
        raise ValueError

    task = asyncio.create_task(fail())

    await cancel_and_wait([task, asyncio.create_task(asyncio.sleep(60))])

    assert task.done()
    await cancel_and_wait([])
