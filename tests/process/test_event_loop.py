"""The event loop: its timers are finer than a millisecond, and it waits for any number of connections."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Iterator
from statistics import median

import pytest

from resplit.process.event_loop import Absences, EventLoop, FineEpollSelector, absent_s

BEYOND_SELECT = 1024


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with contextlib.closing(EventLoop()) as opened:
        yield opened


@pytest.mark.alone
def test_a_sleep_of_a_fifth_of_a_millisecond_takes_less_than_one(loop: asyncio.AbstractEventLoop) -> None:
    async def naps_s() -> list[float]:
        took_s = []
        for _ in range(200):
            begun_s = time.perf_counter()
            await asyncio.sleep(0.0002)
            took_s.append(time.perf_counter() - begun_s)
        return took_s

    took_s = loop.run_until_complete(naps_s())

    assert min(took_s) >= 0.0002
    assert median(took_s) < 0.001  # epoll alone takes at least 1 ms


def test_it_hears_connections_whose_descriptors_select_does_not_take(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.ExitStack() as stack:
        ends: list[socket.socket] = []
        while not ends or ends[-1].fileno() < BEYOND_SELECT:
            ends += [stack.enter_context(end) for end in socket.socketpair()]
        here, there = ends[-2:]
        with pytest.raises(ValueError, match="out of range"):
            select.select([there], [], [], 0)

        async def heard() -> bytes:
            reader, writer = await asyncio.open_connection(sock=there)
            asyncio.get_running_loop().call_later(0.001, here.send, b"!")
            try:
                async with asyncio.timeout(5):
                    return await reader.read(1)
            finally:
                writer.close()

        assert loop.run_until_complete(heard()) == b"!"


def test_a_descriptor_that_becomes_ready_ends_the_wait_at_once() -> None:
    with contextlib.closing(FineEpollSelector()) as selector, contextlib.ExitStack() as stack:
        here, there = (stack.enter_context(end) for end in socket.socketpair())
        selector.register(there, 1)
        here.send(b"!")

        assert [key.fileobj for key, _ in selector.select(60)] == [there]
        there.recv(1)
        assert selector.select(0.0001) == []
        assert selector.select(0) == []


def work(seconds: float) -> None:
    """Do something else than wait for descriptors."""
    time.sleep(seconds)


def test_an_absence_is_remembered_for_half_a_second_at_least(loop: asyncio.AbstractEventLoop) -> None:
    async def absences_s() -> tuple[float, float, float]:
        await asyncio.sleep(0)
        work(0.05)
        within_s = absent_s()
        await asyncio.sleep(0.1)
        after_s = absent_s()
        await asyncio.sleep(1.5)
        return within_s, after_s, absent_s()

    within_s, after_s, later_s = loop.run_until_complete(absences_s())

    assert 0.05 <= within_s <= after_s
    assert later_s < 0.05


def test_waiting_for_a_processor_is_an_absence() -> None:
    absences = Absences()
    now_s = time.perf_counter()
    absences.enter(now_s, 1.0)
    absences.leave(now_s + 0.001)
    absences.enter(now_s + 0.3, 1.02)  # 20 ms late, after it had waited for messages
    assert absences.longest_s(now_s + 0.3) >= 0.02 - 1e-9


def test_a_loop_of_another_kind_tells_no_absence() -> None:
    async def absence_s() -> float:
        return absent_s()

    assert asyncio.run(absence_s()) == 0.0
