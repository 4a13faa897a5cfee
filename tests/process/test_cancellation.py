"""The cancellation of tasks, and tasks whose failure ends their process."""

from __future__ import annotations

import asyncio

import pytest

from resplit.process.cancellation import VitalTasks, cancel_and_wait, to_its_end, until_stopped


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


async def fail_once(begin: asyncio.Event) -> None:
    await begin.wait()
    raise ValueError("a defect")


async def test_a_failure_of_any_owners_task_ends_the_wait_for_the_end() -> None:
    tasks, others, begin = VitalTasks(), VitalTasks(), asyncio.Event()
    others.spawn(fail_once(begin), "broken")
    waiting = asyncio.create_task(until_stopped(asyncio.Event(), tasks, others))
    await asyncio.sleep(0)
    assert not waiting.done()

    begin.set()

    with pytest.raises(ValueError, match="a defect"):
        await asyncio.wait_for(waiting, 5)


async def test_a_failure_before_the_wait_ends_it_at_once() -> None:
    tasks, begin = VitalTasks(), asyncio.Event()
    begin.set()
    with pytest.raises(ValueError, match="a defect"):
        await tasks.spawn(fail_once(begin), "broken")

    with pytest.raises(ValueError, match="a defect"):
        await asyncio.wait_for(until_stopped(asyncio.Event(), tasks), 5)


async def test_tasks_that_end_or_are_stopped_have_not_failed() -> None:
    tasks, stop = VitalTasks(), asyncio.Event()
    await tasks.spawn(asyncio.sleep(0), "short")
    tasks.spawn(asyncio.sleep(60), "long")
    await tasks.stop()
    stop.set()

    await asyncio.wait_for(until_stopped(stop, tasks), 5)


async def test_work_that_must_not_be_left_half_done_delays_a_cancellation() -> None:
    finish, done = asyncio.Event(), False

    async def work() -> None:
        nonlocal done
        await finish.wait()
        done = True

    task = asyncio.create_task(to_its_end(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    finish.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done
