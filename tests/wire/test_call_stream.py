"""The stream of calls: each call gets its own answer, and one that nobody waits for is called off at the node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError

from resplit.errors import CapacityError, DataError, ResplitError
from resplit.security.authority import keys_command
from resplit.security.identity import CALLS, Member
from resplit.wire import call_server
from resplit.wire.addresses import Address
from resplit.wire.answered_stream import Opened
from resplit.wire.call_server import CallServer, ServedCall
from resplit.wire.call_stream import CallStream
from resplit.wire.message_stream import MessageStream, connected
from resplit.wire.node_pb2 import (
    Answer,
    Call,
    CloseRequest,
    EchoReply,
    EchoRequest,
    PermitReply,
    PermitRequest,
    TransferReply,
    TransferRequest,
)
from tests.support.hostile import framed
from tests.support.in_process import until

WITHIN_S = 10.0


@dataclass
class Node:
    """Serves calls. A transfer ends when `go_on` is set, and a call to close sessions is a defect."""

    port: int = 0
    streams: list[MessageStream[Any]] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    begun: list[str] = field(default_factory=list)  # the sessions of the transfers that began
    called_off: list[str] = field(default_factory=list)
    throttled: list[str] = field(default_factory=list)  # the callers of refused calls
    ended: list[ResplitError] = field(default_factory=list)  # why streams ended
    answer: Callable[[Call], bytes] | None = None  # instead of serving: what is written for each call

    async def serve(self, stream: MessageStream[Any]) -> None:
        self.streams.append(stream)
        if answer := self.answer:
            await stream.each(lambda call: stream.transport.write(answer(call)))
            return
        try:
            await CallServer(self._handlers(), self._bear).serve(stream)
        except ResplitError as error:
            self.ended.append(error)

    def _handlers(self) -> dict[str, Handler]:
        def handler(func: Any, kind: type[Message]) -> Handler:
            return Handler(func, Cardinality.UNARY_UNARY, kind, Message)

        return {
            "Echo": handler(self._echo, EchoRequest),
            "TransferCache": handler(self._transfer, TransferRequest),
            "Permit": handler(self._permit, PermitRequest),
            "Close": handler(self._fail, CloseRequest),
        }

    async def _bear(self, caller: str) -> None:
        self.throttled.append(caller)

    async def _echo(self, call: ServedCall) -> None:
        await call.recv_message()
        await call.send_message(EchoReply())

    async def _permit(self, call: ServedCall) -> None:
        request = await call.recv_message()
        if not request.session:
            raise GRPCError(Status.PERMISSION_DENIED, "a session has a name")
        await call.send_message(PermitReply(lengths={request.capacity: request.attempt}))

    async def _transfer(self, call: ServedCall) -> None:
        request = await call.recv_message()
        self.begun.append(request.session)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.called_off.append(request.session)
            raise
        await call.send_message(TransferReply(bytes=len(request.session)))

    async def _fail(self, call: ServedCall) -> None:
        raise ZeroDivisionError


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    keys_command(tmp_path / "keys", ["alpha", "beta"])
    node, tasks = Node(), set[asyncio.Task[None]]()

    class Served(MessageStream[Call]):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            tasks.add(asyncio.ensure_future(node.serve(self)))

    context = Member.load(tmp_path / "keys" / "beta").server_context()
    server = await asyncio.get_running_loop().create_server(
        lambda: Served(Call, call_server.MOST_CALL_BYTES), "127.0.0.1", 0, ssl=context
    )
    node.port = server.sockets[0].getsockname()[1]
    yield node
    server.close()
    for stream in node.streams:
        stream.abort()
    await asyncio.gather(*tasks)


@pytest.fixture
async def calls(node: Node, tmp_path: Path) -> AsyncIterator[CallStream]:
    calls = CallStream("beta", Address("127.0.0.1", node.port), alpha(tmp_path).client_context(CALLS))
    yield calls
    await calls.close()


def alpha(folder: Path) -> Member:
    return Member.load(folder / "keys" / "alpha")


async def raw(node: Node, folder: Path, *calls: Call) -> MessageStream[Answer]:
    """A stream of its own that has sent these calls."""
    context = alpha(folder).client_context(CALLS)
    stream = await connected(Answer, 4096, "beta", Address("127.0.0.1", node.port), context)
    stream.transport.write(b"".join(map(framed, calls)))
    return stream


def transfer(calls: CallStream, session: str, timeout_s: float = WITHIN_S) -> asyncio.Task[TransferReply]:
    return asyncio.create_task(calls.transfer_cache(TransferRequest(session=session), timeout_s))


async def begun(node: Node, count: int) -> None:
    async def all_begun() -> bool:
        return len(node.begun) >= count

    await until(all_begun)


async def test_calls_share_a_stream_and_each_gets_its_own_answer(node: Node, calls: CallStream) -> None:
    slow = [transfer(calls, "s" * number) for number in range(1, 5)]
    await begun(node, 4)
    permits = [calls.permit(PermitRequest(session="s", capacity=n, attempt=n * n), WITHIN_S) for n in range(1, 9)]
    assert [dict(reply.lengths) for reply in await asyncio.gather(*permits)] == [{n: n * n} for n in range(1, 9)]
    assert not any(each.done() for each in slow)
    node.go_on.set()
    assert [reply.bytes for reply in await asyncio.gather(*slow)] == [1, 2, 3, 4]
    assert len(node.streams) == 1


async def test_a_call_that_is_given_up_is_called_off_and_no_other(node: Node, calls: CallStream) -> None:
    kept, cancelled = transfer(calls, "kept"), transfer(calls, "cancelled")
    late = transfer(calls, "late", timeout_s=0.2)
    await begun(node, 3)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(TimeoutError):
        await late

    async def called_off() -> bool:
        return sorted(node.called_off) == ["cancelled", "late"]

    await until(called_off)
    node.go_on.set()
    assert (await kept).bytes == len("kept")


async def test_the_end_of_a_stream_calls_off_its_calls_and_the_next_one_opens_another(
    node: Node, calls: CallStream
) -> None:
    left = transfer(calls, "left")
    await begun(node, 1)
    node.streams[0].abort()
    with pytest.raises(ConnectionResetError):
        await left

    async def called_off() -> bool:
        return node.called_off == ["left"]

    await until(called_off)
    await calls.echo(EchoRequest(), WITHIN_S)
    assert len(node.streams) == 2


async def test_a_call_that_waits_to_be_sent_ends_with_its_stream(node: Node, calls: CallStream) -> None:
    await calls.echo(EchoRequest(), WITHIN_S)
    (await calls._stream.opened()).stream.pause_writing()
    waiting = transfer(calls, "waiting")
    await asyncio.sleep(0)
    node.streams[0].abort()
    async with asyncio.timeout(WITHIN_S / 2):
        with pytest.raises(ConnectionResetError):
            await waiting


async def test_nothing_is_awaited_over_a_stream_that_has_ended() -> None:
    ended: Opened[Answer] = Opened(MessageStream(Answer, 100))
    ended.fail(ConnectionResetError("closed"))
    with pytest.raises(ConnectionResetError, match="closed"), ended.awaiting():
        pass


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("Permit", b"", Status.PERMISSION_DENIED),
        ("Permit", b"\xff\xff", Status.INVALID_ARGUMENT),
        ("Close", CloseRequest(sessions=[""] * 40_000).SerializeToString(), Status.INVALID_ARGUMENT),
        ("Close", b"", Status.UNKNOWN),
        ("Command", b"", Status.UNIMPLEMENTED),
    ],
)
async def test_a_refused_call_is_borne_and_ends_only_itself(
    node: Node, tmp_path: Path, name: str, content: bytes, status: Status
) -> None:
    answers = list[Answer]()
    bad = Call(number=7, name=name, content=content)
    stream = await raw(node, tmp_path, bad, Call(number=8, name="Echo"))
    reading = asyncio.create_task(stream.each(answers.append))

    async def both_answered() -> bool:
        return len(answers) == 2

    await until(both_answered)
    assert {answer.number: answer.status for answer in answers} == {7: status.value, 8: 0}
    assert node.throttled == ["alpha"]
    stream.abort()
    await reading


async def test_a_refusal_reaches_the_caller_with_its_status_and_reason(calls: CallStream) -> None:
    with pytest.raises(GRPCError, match="a session has a name") as refusal:
        await calls.permit(PermitRequest(), WITHIN_S)
    assert refusal.value.status is Status.PERMISSION_DENIED


async def test_a_stream_with_two_calls_of_one_number_ends(node: Node, tmp_path: Path) -> None:
    again = Call(number=1, name="TransferCache")
    await (await raw(node, tmp_path, again, again)).each(lambda answer: None)
    assert [type(error) for error in node.ended] == [DataError]


async def test_a_stream_with_too_many_calls_under_way_ends(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_server, "_MOST_UNDER_WAY", 3)
    some = [Call(number=number, name="TransferCache") for number in range(1, 5)]
    await (await raw(node, tmp_path, *some)).each(lambda answer: None)
    assert [type(error) for error in node.ended] == [CapacityError]


async def test_a_number_may_be_used_again_once_its_call_was_given_up(node: Node, tmp_path: Path) -> None:
    request = TransferRequest(session="s").SerializeToString()
    call = Call(number=1, name="TransferCache", content=request)
    stream = await raw(node, tmp_path, call)
    await begun(node, 1)
    stream.transport.write(b"".join(map(framed, (Call(number=1), call))))
    await begun(node, 2)
    stream.transport.write(framed(Call(number=1)))

    async def both_called_off() -> bool:
        return node.called_off == ["s", "s"]

    await until(both_called_off)
    assert node.ended == []
    stream.abort()


async def test_a_flood_of_calls_is_read_slowly(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_server, "_AT_ONCE", 5)
    monkeypatch.setattr(call_server, "_PER_S", 0.01)
    await raw(node, tmp_path, *(Call(number=number, name="TransferCache") for number in range(1, 100)))
    await begun(node, 6)
    await asyncio.sleep(0.1)
    assert len(node.begun) == 6, "five at once, and the one after which it rests"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda call: framed(Answer(number=call.number, content=b"\xff\xff")), DecodeError),
        (lambda call: framed(Answer(number=call.number, status=999)), ValueError),
        (lambda call: framed(b"\xff\xff"), ValueError),
        (lambda call: b"\xff\xff\xff\xff", ValueError),
        (lambda call: framed(Answer(number=call.number + 1)), TimeoutError),
    ],
    ids=["reply", "status", "answer", "length", "number"],
)
async def test_what_is_no_answer_is_an_error(
    node: Node, calls: CallStream, answer: Callable[[Call], bytes], error: type[Exception]
) -> None:
    node.answer = answer
    with pytest.raises(error):
        await calls.permit(PermitRequest(session="s"), 0.3)
