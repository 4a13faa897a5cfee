"""The stream of caches: transfers share it, a refusal reaches its own transfer, and a break ends all of them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import CapacityError
from resplit.model.activation import Activation
from resplit.security.authority import keys_command
from resplit.security.identity import CACHES, Member
from resplit.wire.addresses import Address
from resplit.wire.cache_stream import CacheStream, OutgoingPart
from resplit.wire.message_stream import MessageStream
from resplit.wire.node_pb2 import CachePart, CacheReply
from resplit.wire.plain_messages import ensure_plain
from resplit.wire.tensors import from_wire
from tests.support.properties import examples

LARGE = 20_000  # positions: 320 kB for each block


class Receiver:
    """Takes parts, and answers as `answer` says. `connections` are those that are open."""

    def __init__(self) -> None:
        self.port = 0
        self.parts: list[CachePart] = []
        self.connections: list[MessageStream[CachePart]] = []
        self.answer: Callable[[CachePart], CacheReply | bytes | None] = stored

    async def serve(self, stream: MessageStream[CachePart]) -> None:
        self.connections.append(stream)

        def take(part: CachePart) -> None:
            self.parts.append(part)
            answer = self.answer(part)
            if isinstance(answer, CacheReply):
                answer.transfer = answer.transfer or part.transfer
                stream.transport.write(len(content := answer.SerializeToString()).to_bytes(4, "big") + content)
            elif answer:
                stream.transport.write(answer)

        await stream.each(take)


def stored(part: CachePart) -> CacheReply | None:
    """Answer at the end of a transfer only."""
    return CacheReply() if part.ends else None


def part(session: str, size: int = 100) -> OutgoingPart:
    return OutgoingPart(session, 1, (3, 4), 7, [cache(size), cache(size)])


def cache(size: int, item: float = 0.5) -> Activation:
    """Keys and values of `size` positions."""
    return Activation("float32", (2, 1, size, 2), struct.pack("<f", item) * 4 * size)


@pytest.fixture
async def receiver(tmp_path: Path) -> AsyncIterator[Receiver]:
    keys_command(tmp_path / "keys", ["alpha", "beta"])
    receiver, tasks = Receiver(), set[asyncio.Task[None]]()

    def connection() -> MessageStream[CachePart]:
        stream = MessageStream(CachePart, 2**20)
        asyncio.get_running_loop().call_soon(begin, stream)
        return stream

    def begin(stream: MessageStream[CachePart]) -> None:
        if not hasattr(stream, "transport"):  # the handshake is under way
            asyncio.get_running_loop().call_later(0.001, begin, stream)
            return
        tasks.add(asyncio.create_task(receiver.serve(stream)))

    context = Member.load(tmp_path / "keys" / "beta").server_context()
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0, ssl=context)
    receiver.port = server.sockets[0].getsockname()[1]
    yield receiver
    server.close()
    for stream in receiver.connections:
        stream.abort()


@pytest.fixture
async def stream(receiver: Receiver, tmp_path: Path) -> AsyncIterator[CacheStream]:
    context = Member.load(tmp_path / "keys" / "alpha").client_context(CACHES)
    stream = CacheStream("beta", Address("127.0.0.1", receiver.port), context)
    yield stream
    await stream.close()


async def send(stream: CacheStream, *parts: OutgoingPart, every_s: float = 0.0) -> None:
    """One transfer of these parts, each so long after the one before."""
    begun_s = asyncio.get_running_loop().time()
    async with asyncio.timeout(10):
        await stream.send([(begun_s + number * every_s, each) for number, each in enumerate(parts)])


@examples(100)
@given(
    positions=st.sampled_from([1, 7, 8, 63, 64, 1023, 1024, 200_000]),
    blocks=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
    first=st.integers(0, 2**32 - 1),
    transfer=st.integers(1, 2**64 - 1),
    ends=st.booleans(),
)
def test_a_part_is_written_as_protobuf_would_write_it(
    positions: int, blocks: list[int], first: int, transfer: int, ends: bool
) -> None:
    caches = [cache(positions, item) for item in range(len(blocks))]
    length, *pieces = OutgoingPart("s", 2, blocks, first, caches).framed(transfer, ends)
    content = b"".join(pieces)
    assert int.from_bytes(length, "big") == len(content)
    ensure_plain(CachePart, content)
    found = CachePart.FromString(content)
    assert (found.session, found.attempt, found.blocks, found.first) == ("s", 2, blocks, first)
    assert (found.transfer, found.ends) == (transfer, ends)
    whole = Activation("float32", (2 * len(blocks), 1, positions, 2), b"".join(each.data for each in caches))
    assert from_wire(found.values) == whole


async def test_transfers_share_a_connection_and_large_parts_arrive_whole(
    stream: CacheStream, receiver: Receiver
) -> None:
    names = [f"session-{number}" for number in range(6)]
    await asyncio.gather(*(send(stream, part(name, LARGE), part(name, LARGE)) for name in names))
    assert len(receiver.connections) == 1
    whole = [(each.session, each.values.shape[2]) for each in receiver.parts]
    assert sorted(whole) == sorted((name, LARGE) for name in names for _ in range(2))


async def test_a_refusal_reaches_its_own_transfer_and_no_other(stream: CacheStream, receiver: Receiver) -> None:
    receiver.answer = lambda part: CacheReply(error="no room") if part.session == "refused" else stored(part)
    other, refused = await asyncio.gather(
        send(stream, part("other")), send(stream, part("refused")), return_exceptions=True
    )
    assert other is None
    assert isinstance(refused, CapacityError)
    assert str(refused) == "beta: no room"


async def test_a_transfer_that_is_refused_sends_no_further_parts(stream: CacheStream, receiver: Receiver) -> None:
    receiver.answer = lambda part: CacheReply(error="no room")

    with pytest.raises(CapacityError, match="no room"):
        await send(stream, *(part("refused") for _ in range(500)), every_s=0.01)
    assert len(receiver.parts) < 500


async def test_a_break_ends_all_transfers_and_the_next_one_connects_again(
    stream: CacheStream, receiver: Receiver
) -> None:
    receiver.answer = lambda part: None
    waiting = [asyncio.create_task(send(stream, part("lost"))) for _ in range(2)]
    async with asyncio.timeout(10):
        while sum(each.ends for each in receiver.parts) < len(waiting):  # noqa: ASYNC110 - the other side's state
            await asyncio.sleep(0.01)
    receiver.connections[0].abort()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, ConnectionResetError) for outcome in outcomes)
    receiver.answer = stored
    await send(stream, part("again"))
    assert len(receiver.connections) == 2


@pytest.mark.parametrize("answer", [b"\0\0\0\2\xff\xff", b"\xff\xff\xff\xff"], ids=["no message", "a long message"])
async def test_what_is_no_answer_is_no_refusal(stream: CacheStream, receiver: Receiver, answer: bytes) -> None:
    receiver.answer = lambda part: answer
    with pytest.raises(ValueError, match="beta"):
        await send(stream, part("one"))


async def test_an_answer_to_a_transfer_that_does_not_run_is_ignored(stream: CacheStream, receiver: Receiver) -> None:
    receiver.answer = lambda part: stored(part) if part.ends else CacheReply(transfer=999, error="no")
    await send(stream, part("one"))
