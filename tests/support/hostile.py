"""A node that lies, a client that sends anything, and a stranger without keys. All of them use real sockets and TLS.

The node and the client hold a member's own credentials, and no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf.message import Message
from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.const import Handler
from grpclib.encoding.proto import ProtoCodec
from grpclib.server import Stream
from h2.config import H2Configuration
from h2.connection import H2Connection

from resplit.node.server import NodeService
from resplit.process.cancellation import cancel_and_wait
from resplit.security.identity import CACHES, CALLS, GRPC, STEPS, Member
from resplit.wire.addresses import Address
from resplit.wire.cache_stream import OutgoingPart
from resplit.wire.call_server import ServedCall, caller_of
from resplit.wire.call_stream import CallStream
from resplit.wire.message_stream import MessageStream
from resplit.wire.node_grpc import NodeStub
from resplit.wire.node_pb2 import (
    Ack,
    Answer,
    CachePart,
    CacheReply,
    Call,
    CloseReply,
    CommandReply,
    EchoReply,
    MeasureReply,
    PermitReply,
    ReportReply,
    Step,
    TokensRequest,
    TransferReply,
)

Sent = Message | bytes  # bytes are sent in place of a serialised message
Honest = Callable[[Any], Awaitable[None]]
Lie = Callable[[Any, Honest], Awaitable[None]]  # serves one call, given its stream and the honest handler


class _AnyBytes(ProtoCodec):  # type: ignore[misc]
    """Sends bytes as they are."""

    def encode(self, message: Any, message_type: Any) -> bytes:
        return message if isinstance(message, bytes) else bytes(super().encode(message, message_type))


def answers(*replies: Sent) -> Lie:
    """Read one message of the caller, and answer with these replies."""

    async def lie(stream: Stream[Any, Any], honest: Honest) -> None:
        await stream.recv_message()
        for reply in replies:
            await stream.send_message(reply)

    return lie


def draws(replies: Sequence[Sent], seed: int = 0) -> Lie:
    """Answer each call with one of these replies, drawn at random."""
    rng = random.Random(seed)

    async def lie(stream: Stream[Any, Any], honest: Honest) -> None:
        await answers(rng.choice(replies))(stream, honest)

    return lie


def alters(change: Callable[[Any], Sent]) -> Lie:
    """Do what an honest node does, and change each message that it answers."""

    class Changing(_AnyBytes):
        def encode(self, message: Any, message_type: Any) -> bytes:
            return super().encode(change(message), message_type)

    async def lie(stream: Stream[Any, Any], honest: Honest) -> None:
        stream._codec = Changing()  # every way of sending encodes
        await honest(stream)

    return lie


def refuses(word: str = "privacy") -> Lie:
    """Refuse each command in the words of a node."""
    return answers(CommandReply(error="I will not", error_kind=word))


async def hangs(stream: Stream[Any, Any], honest: Honest) -> None:
    """Read one message of the caller, and never answer."""
    await stream.recv_message()
    await asyncio.Event().wait()


def hangs_in(kind: str) -> Lie:
    """Never answer commands of this kind, and carry out all others."""

    async def lie(stream: Stream[Any, Any], honest: Honest) -> None:
        receive, command = stream.recv_message, await stream.recv_message()
        if command.kind == kind:
            await asyncio.Event().wait()

        async def again() -> Any:
            stream.recv_message = receive
            return command

        stream.recv_message = again
        await honest(stream)

    return lie


async def breaks(stream: Stream[Any, Any], honest: Honest) -> None:
    """Break the caller's connection."""
    stream._stream._transport.abort()


# What an answer to a command or a request for a report may be instead of the JSON object that is expected.
NONSENSE = ("[]", "{", "{}", "", "null", "7", '"text"', '{"loaded": [-1]}', '{"loaded": "all"}', "NaN", "[" * 9999)
NONSENSE_REPLIES: Mapping[str, tuple[Sent, ...]] = {
    "Command": (
        *(CommandReply(body=body) for body in NONSENSE),
        CommandReply(error="no", error_kind="no such word"),
        b"\xff" * 9,
    ),
    "Report": (
        *(ReportReply(body=body, last=2**64 - 1) for body in NONSENSE),
        ReportReply(body='{"state": {}, "rows": {"unknown": []}}'),
        b"\xff" * 9,
    ),
}


@dataclass
class HostileNode:
    """A node that lies in the calls of `lies`, by name, and is honest in all others.

    `lies` may change at any time. It counts for calls that begin later. `heard` has the name of the call, the caller
    and the content of every message that came. Start one with `InProcessCluster.start(name, hostile.service)`.
    """

    lies: dict[str, Lie] = field(default_factory=dict)
    heard: list[tuple[str, str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._streams: list[MessageStream[Any]] = []  # the open streams of tokens
        self._transports: set[asyncio.WriteTransport] = set()

    def service(self, *parts: Any) -> NodeService:
        """A node's service with these parts that lies."""
        return _LyingService(self, *parts)

    def talk_nonsense(self, *calls: str) -> None:
        """Answer these calls, by default commands and requests for reports, with nonsense."""
        for call in calls or NONSENSE_REPLIES:
            self.lies[call] = draws(NONSENSE_REPLIES[call])

    async def say(self, *tokens: Sent) -> None:
        """Send tokens to each gateway that listens."""
        for stream in list(self._streams):
            stream.transport.write(b"".join(map(framed, tokens)))

    def break_connections(self) -> None:
        """Break every connection over which a call came. The others can connect again."""
        while self._transports:
            self._transports.pop().abort()

    def heard_in(self, call: str) -> list[Any]:
        """The messages that came in calls of this name."""
        return [message for name, _, message in self.heard if name == call]

    def serving_stream(self, name: str, honest: Honest) -> Honest:
        """The handler of streams of `Steps`, `Caches` or `Tokens`: the lie for this name, or else the honest one."""

        async def serve(stream: MessageStream[Any]) -> None:
            each = stream.each

            async def each_recorded(take: Callable[[Any], None]) -> None:
                def record(message: Any) -> None:
                    self.heard.append((name, stream.member, _copy(message)))
                    take(message)

                await each(record)

            stream.each = each_recorded  # type: ignore[method-assign]
            self._transports.add(stream.transport)
            if name == "Tokens":
                self._streams.append(stream)
            try:
                if lie := self.lies.get(name):
                    call = _StreamAsCall(stream)
                    stream.each, stream.send = call.each, call.send  # type: ignore[method-assign]
                    await lie(call, lambda _: honest(stream))
                    stream.abort()
                else:
                    await honest(stream)
            finally:
                if name == "Tokens":
                    self._streams.remove(stream)

        return serve

    def note(self, stream: MessageStream[Any]) -> None:
        """Let `break_connections` break the connection of this stream."""
        self._transports.add(stream.transport)

    def steps(self) -> list[Step]:
        """The steps of passes that came. A step without values only brings a permit."""
        return [step for step in self.heard_in("Steps") if step.HasField("values")]

    def callers_of(self, call: str) -> set[str]:
        """The members that made calls of this name."""
        return {caller for name, caller, _ in self.heard if name == call}

    def _record(self, call: str, stream: Stream[Any, Any]) -> None:
        receive, caller = stream.recv_message, caller_of(stream)

        async def receive_and_record() -> Any:
            message = await receive()
            if message is not None:
                self.heard.append((call, caller, _copy(message)))
            return message

        stream.recv_message = receive_and_record

    def serving(self, call: str, honest: Honest) -> Honest:
        """The handler of a call: the lie for it, or else the honest one."""

        async def serve(stream: Any) -> None:
            if isinstance(stream, ServedCall):
                stream = _AnyAnswers(stream)
            stream._codec = _AnyBytes()
            self._record(call, stream)
            self._transports.add(stream._stream._transport)
            if lie := self.lies.get(call):
                await lie(stream, honest)
            else:
                await honest(stream)

        return serve


class _LyingService(NodeService):
    """A node's service. `node` replaces the handler of each call, and those of streams."""

    def __init__(self, node: HostileNode, *parts: Any) -> None:
        self._node = node
        super().__init__(*parts)

    def __mapping__(self) -> dict[str, Handler]:
        return self._lying(super().__mapping__())

    def frequent(self) -> dict[str, Handler]:
        return self._lying(super().frequent())

    def _lying(self, honest: dict[str, Handler]) -> dict[str, Handler]:
        return {
            path: h._replace(func=self._node.serving(path.rpartition("/")[2], h.func)) for path, h in honest.items()
        }

    async def calls(self, stream: MessageStream[Call]) -> None:
        self._node.note(stream)
        await super().calls(stream)

    async def steps(self, stream: MessageStream[Step]) -> None:
        await self._node.serving_stream("Steps", super().steps)(stream)

    async def parts(self, stream: MessageStream[CachePart]) -> None:
        await self._node.serving_stream("Caches", super().parts)(stream)

    async def tokens(self, stream: MessageStream[TokensRequest]) -> None:
        await self._node.serving_stream("Tokens", super().tokens)(stream)


class _AnyAnswers(ServedCall):
    """A call over a stream of calls that may be answered with any bytes, any number of times."""

    def __init__(self, honest: ServedCall) -> None:
        self.__dict__.update(honest.__dict__)
        self._stream = SimpleNamespace(_transport=self.stream.transport)
        self._codec = _AnyBytes()

    async def send_message(self, reply: Sent) -> None:
        content = self._codec.encode(reply, type(reply))
        await self.stream.send([Answer(number=self._number, content=content)])


class _StreamAsCall:
    """A stream in the form of a call, as lies expect it. The honest handler gets what `recv_message` returns.

    What it sends is encoded by a codec that a lie may replace.
    """

    def __init__(self, stream: MessageStream[Any]) -> None:
        self._stream = SimpleNamespace(_transport=stream.transport)
        self._each = stream.each
        self._codec = _AnyBytes()
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._reading: asyncio.Future[None] | None = None

    async def recv_message(self) -> Any:
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._each(self._messages.put_nowait))
        return await self._messages.get()

    async def each(self, take: Callable[[Any], None]) -> None:
        while True:
            take(await self.recv_message())

    async def send(self, messages: Sequence[Message]) -> None:
        for message in messages:
            await self.send_message(self._codec.encode(message, type(message)))

    async def send_message(self, message: Sent) -> None:
        self._stream._transport.write(framed(message))


def _copy(message: Message) -> Message:
    """A copy: the node makes the next step of a pass out of the one that came."""
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def framed(message: Sent) -> bytes:
    """A message as a stream carries it."""
    content = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack(">I", len(content)) + content


def _ending(part: CachePart) -> CachePart:
    """A copy of this part, which ends its transfer."""
    last = CachePart(ends=True)
    last.MergeFrom(part)
    return last


class AnyPart(OutgoingPart):
    """Any message in the place of a part of caches."""

    def __init__(self, message: CachePart) -> None:
        super().__init__(message.session, message.attempt, message.blocks, message.first, ())
        object.__setattr__(self, "_message", message)

    def framed(self, transfer: int, ends: bool) -> list[bytes]:
        message: CachePart = self._message  # type: ignore[attr-defined]
        message.transfer, message.ends = transfer, ends
        return [framed(message)]


_REPLIES: Mapping[str, type[Message]] = {
    "Report": ReportReply,
    "Measure": MeasureReply,
    "Echo": EchoReply,
    "TransferCache": TransferReply,
    "Permit": PermitReply,
    "Close": CloseReply,
}


class _Serialised:
    """Bytes in the place of a message."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def SerializeToString(self) -> bytes:
        return self._content


class HostileClient:
    """Sends anything to nodes as the member whose keys are in `keys`."""

    def __init__(self, addresses: Mapping[str, Address], keys: Path) -> None:
        self.member = Member.load(keys)
        self._addresses = addresses
        self._channels: dict[str, Channel] = {}
        self._calls: dict[str, CallStream] = {}

    def stub(self, node: str) -> NodeStub:
        """The calls of a node over gRPC. Bytes may stand for any message."""
        if node not in self._channels:
            address = self._addresses[node]
            self._channels[node] = Channel(
                address.host,
                address.port,
                ssl=self.member.client_context(),
                codec=_AnyBytes(),
                config=Configuration(ssl_target_name_override=node),
            )
        return NodeStub(self._channels[node])

    async def call(self, node: str, name: str, message: Sent) -> Any:
        """Make a call with one message and one answer."""
        if name == "Command":
            return await self.stub(node).Command(message)
        if node not in self._calls:
            context = self.member.client_context(CALLS)
            self._calls[node] = CallStream(node, self._addresses[node], context)
        request: Any = _Serialised(message) if isinstance(message, bytes) else message
        return await self._calls[node]._call(name, request, _REPLIES.get(name, Ack), 60.0)

    async def steps(self, node: str, steps: Sequence[Step | bytes]) -> None:
        """Send steps on one stream, and wait for the acknowledgement of each.

        ConnectionResetError if the node ends the stream before.
        """
        async with self._stream(node, STEPS, Ack) as (stream, acks):
            for step in steps:
                if isinstance(step, Step):
                    step.acknowledge = True
                stream.transport.write(framed(step))
            for _ in steps:
                if await acks.get() is None:
                    raise ConnectionResetError(f"{node} ended the stream of steps")

    async def cache(self, node: str, parts: Sequence[CachePart | bytes]) -> CacheReply:
        """Send parts of caches on one stream, as one transfer, and return the first answer.

        ConnectionResetError if the node ends the stream before.
        """
        async with self._stream(node, CACHES, CacheReply) as (stream, replies):
            *others, last = parts or [CachePart()]
            ended = [last, CachePart(ends=True)] if isinstance(last, bytes) else [_ending(last)]
            for part in (*others, *ended):
                stream.transport.write(framed(part))
            reply: CacheReply | None = await replies.get()
            if reply is None:
                raise ConnectionResetError(f"{node} ended the stream of caches")
            return reply

    @contextlib.asynccontextmanager
    async def _stream(
        self, node: str, protocol: str, kind: type[Message]
    ) -> AsyncIterator[tuple[MessageStream[Any], asyncio.Queue[Any]]]:
        """A new stream to a node, and what it answers; None at its end."""
        address, answers = self._addresses[node], asyncio.Queue[Any]()
        _, stream = await asyncio.get_running_loop().create_connection(
            lambda: MessageStream(kind, 4096, on_ended=lambda _: answers.put_nowait(None)),
            address.host,
            address.port,
            ssl=self.member.client_context(protocol),
            server_hostname=node,
        )
        receiving = asyncio.create_task(stream.each(answers.put_nowait))
        try:
            yield stream, answers
        finally:
            stream.abort()
            await cancel_and_wait([receiving])

    async def frame(self, node: str, path: str, body: bytes, waits_s: float = 0.1) -> None:
        """Send any bytes as the body of a call, in well-formed HTTP/2 and TLS."""
        connection = H2Connection(H2Configuration(header_encoding="ascii"))
        connection.initiate_connection()
        headers = [(":method", "POST"), (":scheme", "https"), (":path", f"/resplit.wire.Node/{path}")]
        headers += [(":authority", node), ("te", "trailers"), ("content-type", "application/grpc")]
        connection.send_headers(1, headers)
        connection.send_data(1, body, end_stream=True)
        await self.raw(node, connection.data_to_send(), waits_s)

    async def raw(self, node: str, content: bytes, waits_s: float = 0.1, protocol: str = GRPC) -> bytes:
        """Send any bytes inside TLS, after a valid handshake for `protocol`, and return what comes back."""
        return await exchange(self._addresses[node], content, waits_s, self.member.client_context(protocol), node)

    async def disconnect(self) -> None:
        """Close every connection."""
        for channel in self._channels.values():
            channel.close()
        await asyncio.gather(*(calls.close() for calls in self._calls.values()))


async def exchange(
    address: Address,
    content: bytes,
    waits_s: float = 0.1,
    context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> bytes:
    """Send any bytes to a port, and return what comes back until it closes, or within `waits_s`."""
    reader, writer = await asyncio.open_connection(
        address.host, address.port, ssl=context, server_hostname=server_hostname
    )
    back = b""
    try:
        writer.write(content)
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(waits_s):
                while received := await reader.read(65536):
                    back += received
    finally:
        writer.transport.abort()
    return back


def without_certificate() -> ssl.SSLContext:
    """TLS of a client that shows no certificate and trusts every server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


@contextlib.asynccontextmanager
async def idle_connections(address: Address, count: int) -> Any:
    """Keep `count` TCP connections open that send nothing, as far as the port accepts them."""
    writers: list[asyncio.StreamWriter] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(address.host, address.port)
                writers.append(writer)
        yield writers
    finally:
        for writer in writers:
            writer.transport.abort()
