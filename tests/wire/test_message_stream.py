"""A stream of messages, without a socket: what arrives in any pieces, what is kept of it, and what ends it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import CapacityError, DataError
from resplit.wire import message_limits, message_stream
from resplit.wire.message_limits import Arriving
from resplit.wire.message_stream import MessageStream
from resplit.wire.node_pb2 import Ack, Step
from tests.support.hostile import framed
from tests.support.properties import examples


class Transport:
    """A TLS transport to a member. It keeps what is written."""

    def __init__(self, member: str) -> None:
        self.member = member
        self.written: list[bytes] = []
        self.aborted = False
        self.reading = True

    def get_extra_info(self, name: str) -> Any:
        assert name == "peercert"
        return {"subject": ((("commonName", self.member),),)}

    def write(self, content: bytes) -> None:
        self.written.append(content)

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Stream:
    """A stream from `member`, what it took, and the task that takes it."""

    def __init__(
        self,
        arriving: Arriving | None = None,
        member: str = "beta",
        most_bytes: int = 2**20,
        take: Callable[[Step], None] | None = None,
    ) -> None:
        self.end: MessageStream[Step] = MessageStream(Step, most_bytes, arriving)
        self.transport = Transport(member)
        self.end.connection_made(cast(asyncio.Transport, self.transport))
        self.taken: list[Step] = []
        self.serving = asyncio.ensure_future(self.end.each(take or self.taken.append))

    async def receive(self, *pieces: bytes) -> None:
        await asyncio.sleep(0)  # `each` begins
        for piece in pieces:
            while piece:
                room = self.end.get_buffer(-1)
                room[: len(piece)], read = piece[: len(room)], min(len(room), len(piece))
                self.end.buffer_updated(read)
                piece = piece[read:]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the stream goes on in the next turns of the event loop
            await asyncio.sleep(0)


def step(name: str, size: int = 0) -> Step:
    found = Step(session=name)
    found.values.data = bytes(size)
    return found


@examples(200)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 200, 70_000]), max_size=5),
    cuts=st.lists(st.integers(1, 100_000), max_size=20),
)
def test_messages_arrive_whole_and_in_order_however_they_are_cut(sizes: list[int], cuts: list[int]) -> None:
    async def run() -> None:
        sent = [step(f"s{number}", size) for number, size in enumerate(sizes)]
        content, stream, first = b"".join(map(framed, sent)), Stream(), 0
        for cut in [*cuts, len(content)]:
            await stream.receive(content[first : first + cut])
            first += cut
        await until(lambda: len(stream.taken) >= len(sent))
        assert stream.taken == sent
        stream.end.connection_lost(None)
        await stream.serving

    asyncio.run(run())


async def test_what_is_sent_arrives_at_the_other_end() -> None:
    here, there = Stream(), Stream()
    sent = [step("small"), step("large", 600_000), step("last")]
    await here.end.send(sent)
    await there.receive(*here.transport.written)
    assert there.taken == sent


async def test_a_message_that_is_too_long_ends_the_stream_before_it_is_kept() -> None:
    stream = Stream(most_bytes=100)
    await stream.receive(struct.pack(">I", 101), bytes(50))
    with pytest.raises(CapacityError, match="beta sends a message of 101 bytes, the limit is 100"):
        await stream.serving
    assert stream.transport.aborted
    assert len(stream.end._buffer) == message_stream._ROOM_BYTES


async def test_the_room_of_a_large_message_is_free_again_and_grows_with_what_arrives() -> None:
    stream = Stream(most_bytes=2**30)
    await stream.receive(struct.pack(">I", 2**29), bytes(100_000))
    assert len(stream.end._buffer) <= 200_000, "half a GiB was announced, and 100 kB arrived"
    whole = Stream(most_bytes=2**22)
    await whole.receive(framed(step("large", 2**21)))
    assert len(whole.taken) == 1
    assert len(whole.end._buffer) == message_stream._ROOM_BYTES


async def test_bytes_that_are_no_message_end_the_stream_after_the_messages_before_them() -> None:
    stream = Stream()
    await stream.receive(framed(step("good")) + framed(b"\xff\xff\xff") + framed(step("late")))
    with pytest.raises(DataError, match="beta sent 3 bytes that are no message"):
        await stream.serving
    assert stream.transport.aborted
    assert [each.session for each in stream.taken] == ["good"]


async def test_half_messages_of_one_member_are_bounded_over_all_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_limits, "MAX_MESSAGE_BYTES", 200_000)
    arriving, half = Arriving(), struct.pack(">I", 90_000) + bytes(10)
    first, second, third = (Stream(arriving) for _ in range(3))
    other = Stream(arriving, "gamma")
    for stream in (first, second, third, other):
        await stream.receive(half)
    with pytest.raises(CapacityError, match="beta sends 270000 bytes at the same time"):
        await third.serving
    assert [each.transport.aborted for each in (first, second, other)] == [False] * 3

    first.end.connection_lost(None)

    fourth = Stream(arriving)
    await fourth.receive(half)
    assert not fourth.transport.aborted, "the room of a stream that ended is free again"


async def test_what_is_done_with_a_message_may_end_the_stream() -> None:
    def refuse(message: Step) -> None:
        raise DataError(f"no {message.session}")

    stream = Stream(take=refuse)
    await stream.receive(framed(step("one")) + framed(step("two")))
    with pytest.raises(DataError, match="no one"):
        await stream.serving
    assert stream.transport.aborted


async def test_nothing_more_is_written_while_the_other_side_takes_nothing() -> None:
    stream = Stream()
    stream.end.pause_writing()
    sending = asyncio.ensure_future(stream.end.send([Ack(number=1)]))
    await asyncio.sleep(0)
    assert stream.transport.written == []
    stream.end.resume_writing()
    await sending
    assert stream.transport.written == [framed(Ack(number=1))]


async def test_a_long_message_is_not_cut_by_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_stream, "_WRITE_BYTES", 1000)
    stream = Stream()
    stream.transport.write = lambda content: (  # type: ignore[method-assign]
        stream.transport.written.append(content),
        stream.end.pause_writing(),
    )[0]
    sent = [step("long", 3000), step("short")]
    sending = [asyncio.create_task(stream.end.send([each])) for each in sent]
    while not all(each.done() for each in sending):
        stream.end.resume_writing()
        await asyncio.sleep(0)
    assert b"".join(stream.transport.written) == b"".join(map(framed, sent))


async def test_a_stream_ends_if_the_rest_of_a_message_will_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_stream, "_WRITE_BYTES", 1000)
    for begun in (False, True):
        stream = Stream()
        if not begun:
            stream.end.pause_writing()
        stream.transport.write = lambda content, stream=stream: stream.end.pause_writing()  # type: ignore[method-assign, misc]
        sending = asyncio.create_task(stream.end.send([step("long", 3000)]))
        await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert stream.transport.aborted == begun


async def test_sending_ends_with_the_connection() -> None:
    stream = Stream()
    stream.end.pause_writing()
    sending = asyncio.ensure_future(stream.end.send([Ack(number=1)]))
    await asyncio.sleep(0)
    stream.end.abort()
    stream.end.connection_lost(ConnectionResetError())
    await sending
    assert stream.transport.written == []


async def test_many_messages_are_taken_in_several_turns_and_nothing_is_read_meanwhile() -> None:
    stream, count = Stream(), 10 * message_stream._TAKEN_PER_TURN
    await stream.receive(b"".join(framed(step(str(number))) for number in range(count)))
    assert 0 < len(stream.taken) < count
    assert not stream.transport.reading
    await until(lambda: stream.transport.reading)
    assert [each.session for each in stream.taken] == [str(number) for number in range(count)]


async def test_a_stream_that_rests_takes_and_reads_nothing() -> None:
    def rest(message: Step) -> None:
        stream.taken.append(message)
        stream.end.rest(3600.0 if message.session == "first" else 0.0)

    stream = Stream(take=rest)
    await stream.receive(framed(step("first")) + framed(step("second")))
    await stream.receive(framed(step("third")))
    assert [each.session for each in stream.taken] == ["first"]
    assert not stream.transport.reading
    stream.end.rest(0.0)
    await until(lambda: stream.transport.reading)
    assert [each.session for each in stream.taken] == ["first", "second", "third"]


async def test_a_stream_that_rests_ends_with_its_connection() -> None:
    stream = Stream()
    await stream.receive(b"")
    stream.end.rest(3600.0)
    stream.end.connection_lost(None)
    await stream.serving
    assert stream.end._next_turn is None or stream.end._next_turn.cancelled()


async def test_a_large_message_of_small_fields_ends_the_stream_before_it_is_parsed() -> None:
    stream = Stream()
    await stream.receive(framed(b"\x82\x01\x00" * 100_000))
    with pytest.raises(DataError, match="beta sent 300000 bytes that are no message"):
        await stream.serving
    assert stream.transport.aborted
