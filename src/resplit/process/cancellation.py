"""Cancels tasks reliably, and ends the process with an error when a task fails without which it cannot serve."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

import structlog

_log = structlog.get_logger(__name__)
_CANCEL_AGAIN_S = 0.2
_Result = TypeVar("_Result")


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until all have ended. Their results and exceptions are dropped.

    One cancellation may be lost: if it coincides with the loss of a connection, grpclib raises the loss instead, and a
    task that retries after a loss continues.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)
        for task in done:
            retrieve_error(task)


def retrieve_error(task: asyncio.Task[Any]) -> None:
    """Retrieve the error of a task that has ended, so that asyncio does not log it where nobody awaits the task."""
    if not task.cancelled():
        task.exception()


async def to_its_end(work: Awaitable[None]) -> None:
    """Await work that must not be left half done, as in a thread. A cancellation takes effect once it has ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Await work, or cancel it once `stop` is set."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        await cancel_and_wait([working, stopping])


class VitalTasks:
    """Tasks that run until they end or their owner stops them. Their process must not continue after one has failed.

    The process waits in `until_stopped`. Work whose failure harms only one session or one peer does not belong here.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None

    def spawn(self, work: Coroutine[Any, Any, _Result], name: str) -> asyncio.Task[_Result]:
        """Start a task."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def stop(self) -> None:
        """Cancel all tasks and wait for their end."""
        await cancel_and_wait(self._tasks)

    async def failure(self) -> BaseException:
        """Wait until a task fails. Returns the error of the first one that did."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("a vital task failed", task=task.get_name(), exc_info=error)
            self._failure = self._failure or error
            self._failed.set()


async def until_stopped(stop: asyncio.Event, *owners: VitalTasks) -> None:
    """Wait until `stop` is set. Raises the error of a vital task as soon as one fails."""
    stopping = asyncio.create_task(stop.wait())
    failures = [asyncio.create_task(tasks.failure()) for tasks in owners]
    try:
        await asyncio.wait([stopping, *failures], return_when=asyncio.FIRST_COMPLETED)
        for failed in failures:
            if failed.done():
                raise failed.result()
    finally:
        await cancel_and_wait([stopping, *failures])
