"""An emulated link keeps the order of messages, and respects its bandwidth and latency."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import CapacityError
from resplit.wire.emulated_link import EmulatedLink, Sender, Shape
from tests.support.properties import examples
from tests.support.simulated_clock import SimulatedClock, run_simulated

SHAPES = st.builds(Shape, st.floats(0, 1), st.floats(1e3, 1e9))
MESSAGES = st.lists(st.tuples(st.floats(0, 2), st.integers(0, 10**6)), min_size=1, max_size=20)


@examples(150)
@given(shape=SHAPES, messages=MESSAGES)
def test_messages_keep_their_order_within_bandwidth_and_latency(
    shape: Shape, messages: list[tuple[float, int]]
) -> None:
    async def check(clock: SimulatedClock) -> None:
        link, sent, due = EmulatedLink(shape), [], []
        for pause_s, size in messages:
            clock.now_s += pause_s
            sent.append(clock.now_s)
            due.append(link.due_s(size))
        assert due == sorted(due)
        for first in range(len(messages)):
            for last in range(first, len(messages)):
                # A first-in-first-out queue: the bytes of a busy period fit into its bandwidth, and none are lost.
                transfer_s = sum(size for _, size in messages[first : last + 1]) / shape.bandwidth_bytes_per_s
                assert due[last] >= sent[first] + transfer_s + shape.latency_s - 1e-9
        # And it arrives at the latest of these bounds: the link is never idle while a message waits.
        for last in range(len(messages)):
            bounds = [
                sent[first] + sum(size for _, size in messages[first : last + 1]) / shape.bandwidth_bytes_per_s
                for first in range(last + 1)
            ]
            assert due[last] == pytest.approx(max(bounds) + shape.latency_s, abs=1e-9)

    run_simulated(check)


@examples(100)
@given(before=SHAPES, after=SHAPES, sizes=st.lists(st.integers(0, 10**6), min_size=2, max_size=10))
def test_no_message_overtakes_another_when_the_link_gets_faster(before: Shape, after: Shape, sizes: list[int]) -> None:
    async def check(clock: SimulatedClock) -> None:
        link = EmulatedLink(before)
        early = [link.due_s(size) for size in sizes]
        link.shape = after
        late = [link.due_s(size) for size in sizes]
        assert early + late == sorted(early + late)

    run_simulated(check)


def test_a_link_without_a_shape_delays_nothing() -> None:
    async def check(clock: SimulatedClock) -> None:
        clock.now_s = 3.0
        assert EmulatedLink().due_s(10**9) == 3.0
        await EmulatedLink().cross(10**9)
        assert clock.now_s == 3.0

    run_simulated(check)


def test_an_idle_link_saves_up_no_bandwidth() -> None:
    async def check(clock: SimulatedClock) -> None:
        link = EmulatedLink(Shape(0.5, 100.0))
        assert link.due_s(100) == 1.5
        clock.now_s = 10.0
        assert link.due_s(100) == 11.5

    run_simulated(check)


@examples(50)
@given(shape=SHAPES, sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
def test_a_sender_sends_each_message_when_it_is_due(shape: Shape, sizes: list[int]) -> None:
    async def check(clock: SimulatedClock) -> None:
        arrived: list[tuple[int, float]] = []

        async def send(numbers: list[int]) -> None:
            arrived.extend((number, clock.time()) for number in numbers)

        sender = Sender(EmulatedLink(shape), send)
        twin = EmulatedLink(shape)
        for number, size in enumerate(sizes):
            sender.put(number, size)
        task = asyncio.create_task(sender.run())
        await asyncio.sleep(sum(sizes) / shape.bandwidth_bytes_per_s + shape.latency_s + 1)
        task.cancel()
        assert [number for number, _ in arrived] == list(range(len(sizes)))
        clock.now_s = 0.0
        assert [at for _, at in arrived] == pytest.approx([twin.due_s(size) for size in sizes])

    run_simulated(check)


async def test_a_sender_with_a_full_queue_raises_a_capacity_error() -> None:
    stuck = asyncio.Event()

    async def send(messages: list[str]) -> None:
        await stuck.wait()

    sender = Sender(EmulatedLink(), send, bound=2)
    task = asyncio.create_task(sender.run())
    sender.put("on its way", 1)
    await asyncio.sleep(0)
    sender.put("one", 1)
    sender.put("two", 1)
    with pytest.raises(CapacityError, match="already wait"):
        sender.put("three", 1)
    task.cancel()


async def test_messages_that_wait_together_are_sent_together() -> None:
    sent: asyncio.Queue[list[str]] = asyncio.Queue()
    sender = Sender(EmulatedLink(), sent.put)
    task = asyncio.create_task(sender.run())
    for message in ("one", "two"):
        sender.put(message, 1)
    assert await sent.get() == ["one", "two"]
    sender.put("three", 1)
    assert await sent.get() == ["three"]
    task.cancel()


async def test_a_failed_connection_ends_the_sender() -> None:
    async def send(messages: list[str]) -> None:
        raise ConnectionResetError

    sender = Sender(EmulatedLink(), send)
    sender.put("lost", 1)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(sender.run(), 1)


def test_a_slow_link_is_slow_for_large_messages_only() -> None:
    async def check(clock: SimulatedClock) -> None:
        link = EmulatedLink(Shape(0.002, 1e6))
        assert link.due_s(0) == pytest.approx(0.002)
        assert EmulatedLink(Shape(0.002, 1e6)).due_s(10**6) == pytest.approx(1.002)
        assert math.isclose(EmulatedLink(Shape(0.002, 1e9)).due_s(10**6), 0.003)

    run_simulated(check)


def test_a_link_is_idle_when_no_message_waits_for_its_bandwidth() -> None:
    async def check(clock: SimulatedClock) -> None:
        link = EmulatedLink(Shape(5.0, 1e6))  # the latency is long, but a message on its way does not count
        await link.idle()
        assert clock.now_s == 0.0
        link.due_s(100_000)
        await link.idle()
        assert clock.now_s == pytest.approx(0.1)
        assert link.due_s(0) == pytest.approx(5.1)

    run_simulated(check)
