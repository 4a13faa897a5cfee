"""The connections to one node, over mutual TLS: a channel for commands, and streams of all else.

This is the border: what the node says is parsed here, once. An answer that no node gives is a fault of that node.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from pydantic import Field, TypeAdapter, ValidationError

from resplit.errors import CapacityError, DataError, NodeLostError, PeerFaultError, ResplitError, error_from_wire
from resplit.security.identity import CACHES, CALLS, STEPS, TOKENS, Member
from resplit.security.signing import audience_of
from resplit.status import NodeReport
from resplit.telemetry.rows import MAX_NAME_CHARS, MAX_REPORTED_ROWS, BlockRow, Count, LinkRow, NodeRow
from resplit.wire import node_pb2 as wire
from resplit.wire.addresses import Address
from resplit.wire.cache_stream import CacheStream, OutgoingPart
from resplit.wire.call_stream import CallStream
from resplit.wire.choices import are_logprobs
from resplit.wire.commands import Reply
from resplit.wire.emulated_link import EmulatedLink
from resplit.wire.message_limits import MAX_ANSWER_BYTES, BoundedChannel
from resplit.wire.message_stream import connected
from resplit.wire.node_grpc import NodeStub
from resplit.wire.node_pb2 import (
    CloseRequest,
    CommandRequest,
    EchoRequest,
    MeasureRequest,
    ReportRequest,
    Step,
    Token,
    TokensRequest,
    TransferReply,
    TransferRequest,
)
from resplit.wire.permits import Permit
from resplit.wire.step_stream import Crossing, StepStream
from resplit.wire.version import NO_VERSION, Version, mismatch, own_version

# While a larger part of a cache is read, every stream of the receiver waits.
CHUNK_BYTES = 256 * 1024
# A background part delays a step by this time at most, or by the time of so many bytes: each part has its own cost.
_BACKGROUND_S, _BACKGROUND_BYTES = 0.013, 64 * 1024
_WINDOW_BYTES = 8 * 2**20
# Of an answer: while it is read, every stream of this process waits. The longest, a report, has about 0.5 MiB.
_MAX_TEXT_CHARS = 2 * 2**20
_CONNECTION_ERRORS = (OSError, StreamTerminatedError, asyncio.TimeoutError)
_WORD = re.compile("[a-z_]{1,40}")
# A node that stops or is overloaded answers with these. It is lost, and has done nothing wrong.
_NO_FAULT = (
    Status.CANCELLED,
    Status.DEADLINE_EXCEEDED,
    Status.FAILED_PRECONDITION,
    Status.RESOURCE_EXHAUSTED,
    Status.UNAVAILABLE,
)


@dataclass(frozen=True)
class Hello:
    """The first words of a node on a stream of tokens: the nonce of its process, and the highest epoch it obeyed.

    `clock_s` is its time, in seconds since 1970.
    """

    nonce: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    epoch: Count
    clock_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]


_HELLO = TypeAdapter(Hello)
_REPORT = TypeAdapter(NodeReport)
_REPLY = TypeAdapter(Reply)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Echo:
    """A message and its empty answer took `round_trip_s`, of which the peer kept the message for `absent_s` at most."""

    round_trip_s: float
    absent_s: float = 0.0


@dataclass
class Peer:
    """A node to which `member` connects with its certificate. `link` delays the messages to it.

    Tokens that it sends are below `vocabulary`.

    Every call raises NodeLostError if the peer does not answer, and PeerFaultError if it answers what no node answers.
    `on_crossing` gets the time of each acknowledged step; `on_lost` gets the peer's name and the steps that were not
    acknowledged when their stream broke; `on_fault` gets the peer's name and what it did.
    """

    name: str
    address: Address
    member: Member
    link: EmulatedLink = field(default_factory=EmulatedLink)
    on_crossing: Callable[[Crossing], None] = lambda crossing: None
    on_lost: Callable[[str, list[Step]], None] = lambda name, steps: None
    on_fault: Callable[[str, str], None] = lambda name, reason: None
    vocabulary: int = 2**31
    hello: Hello | None = field(default=None, init=False)  # of the stream of tokens that was opened last
    fault_count: int = field(default=0, init=False)
    clock_ahead_s: float = field(default=0.0, init=False)  # its clock less ours, at that stream's opening

    def __post_init__(self) -> None:
        config = Configuration(
            ssl_target_name_override=self.name,
            http2_connection_window_size=_WINDOW_BYTES,
            http2_stream_window_size=_WINDOW_BYTES,
        )
        self._channel = BoundedChannel(
            self.address.host, self.address.port, ssl=self.member.client_context(), config=config
        )
        self._stub = NodeStub(self._channel)
        self._background = asyncio.Lock()
        self.background_bytes = _BACKGROUND_BYTES  # of the next background part at most
        self._unanswered: set[asyncio.Timeout] = set()  # the scopes of the commands that run
        self._given_up = False
        self._steps = StepStream(
            self.name,
            self.address,
            self.member.client_context(STEPS),
            self.link,
            lambda crossing: self.on_crossing(crossing),  # the owner may replace both later
            lambda name, steps: self.on_lost(name, steps),
        )
        self._calls = CallStream(self.name, self.address, self.member.client_context(CALLS))
        self._caches = CacheStream(self.name, self.address, self.member.client_context(CACHES))

    @property
    def audience(self) -> str:
        """The audience of commands to the node's present process; NodeLostError before its first stream of tokens."""
        if self.hello is None:
            raise NodeLostError(f"{self.name} has not been connected yet")
        return audience_of(self.name, self.hello.nonce)

    def fault(self, reason: str) -> PeerFaultError:
        """Report a fault of this peer to `on_fault`; the error to raise."""
        self.fault_count += 1
        self.on_fault(self.name, reason)
        return PeerFaultError(f"{self.name}: {reason}")

    def send(self, step: Step) -> None:
        """Queue a step. The peer acknowledges it, or it is passed to `on_lost` if the connection breaks.

        CapacityError if too many steps already wait for the peer.
        """
        self._steps.send(step)

    def send_at_once(self, step: Step) -> bool:
        """Send a step now, in any thread, or return False if it has to wait: then `send` it. Otherwise as `send`."""
        return self._steps.send_at_once(step)

    async def command(self, kind: str, signed: str, timeout_s: float = 60.0) -> Reply:
        """Send a signed command and return the reply. Raises the error with which the node refuses it.

        No answer in time is a fault. NodeLostError if the node is given up before (`give_up`).
        """
        if self._given_up:
            raise NodeLostError(f"{self.name} was lost before {kind!r} was sent")
        with self._asking():
            try:
                async with asyncio.timeout(None) as scope:
                    self._unanswered.add(scope)
                    reply = await self._stub.Command(CommandRequest(kind=kind, signed=signed), timeout=timeout_s)
            except TimeoutError:
                if scope not in self._unanswered:
                    raise NodeLostError(f"{self.name} was lost before it answered {kind!r}") from None
                raise self.fault(f"it did not answer {kind!r} within {timeout_s:.3g} s") from None
            finally:
                self._unanswered.discard(scope)
        if not reply.error_kind:
            return self._parsed(_REPLY, reply.body, f"its reply to {kind!r}")
        if not _WORD.fullmatch(reply.error_kind):
            raise self.fault(f"its reply to {kind!r} has no reason but {reply.error_kind!r:.60}")
        raise error_from_wire(reply.error_kind, f"{self.name}: {reply.error}")

    def give_up(self) -> None:
        """Wait for no answers to commands until a stream of tokens is opened again: the node is lost."""
        self._given_up = True
        while self._unanswered:  # a scope can be ended once only
            self._unanswered.pop().reschedule(asyncio.get_running_loop().time())

    async def report(self, after: int, timeout_s: float = 5.0) -> tuple[NodeReport, int]:
        """The node's state and its telemetry rows numbered above `after`, and the number of the last of these rows."""
        with self._asking():
            reply = await self._calls.report(ReportRequest(after=after), timeout_s)
        report = self._parsed(_REPORT, reply.body, "its report")
        rows: list[NodeRow | LinkRow | BlockRow] = [*report.rows.nodes, *report.rows.links, *report.rows.blocks]
        if len(rows) > MAX_REPORTED_ROWS:
            raise self.fault(f"its report has {len(rows)} rows, the limit is {MAX_REPORTED_ROWS}")
        if others := {report.state.node, *(row.node for row in rows)} - {self.name}:
            raise self.fault(f"its report is about {min(others)!r:.60}")
        return report, reply.last

    async def measure(self, nodes: Sequence[str], timeout_s: float = 5.0) -> None:
        """Have the node measure its links to these nodes, and itself if it is one of them. Reports have the results."""
        with self._asking():
            await self._calls.measure(MeasureRequest(nodes=nodes), timeout_s)

    async def echo(self, payload_bytes: int, timeout_s: float = 10.0) -> Echo:
        """Send a message of this size, and wait for an empty answer."""
        begun_s = time.monotonic()
        await self.link.cross(payload_bytes)
        with self._asking():
            reply = await self._calls.echo(EchoRequest(payload=bytes(payload_bytes)), timeout_s)
        trip_s = time.monotonic() - begun_s
        return Echo(trip_s, min(reply.absent_s, trip_s) if reply.absent_s > 0 else 0.0)

    async def listen(self, take: Callable[[Token], None], on_open: Callable[[], None] = lambda: None) -> None:
        """Call `take` with every token (error, or news) that the node sends to this gateway, until the stream breaks.

        `on_open` is called once the node has said its first words; then `hello` is that of its present process.
        NodeLostError at the end, or what `take` raises.
        """
        with self._asking():
            context = self.member.client_context(TOKENS)
            stream = await connected(Token, MAX_ANSWER_BYTES, self.name, self.address, context)
            asked_s = time.time()
            await stream.send([TokensRequest(version=own_version().message())])
        greeted = False
        if not stream.is_agreed(TOKENS):
            stream.abort()
            raise self.fault(mismatch(self.name, NO_VERSION, self.member.name))

        def each(token: Token) -> None:
            nonlocal greeted
            if greeted:
                self._check(token)
                take(token)
                return
            self._greet(token.hello, asked_s)
            greeted = True
            on_open()

        try:
            await stream.each(each)
        except (DataError, CapacityError) as error:
            raise self.fault(f"what it sends cannot be read: {error!s:.200}") from error
        finally:
            stream.abort()
        raise NodeLostError(f"{self.name} at {self.address} closed its stream of tokens")

    async def cache(self, parts: Sequence[OutgoingPart], timeout_s: float = 60.0) -> int:
        """Send parts of caches to the node. Returns the bytes sent. CapacityError if the node refuses a part."""
        if not parts:
            return 0
        sizes = [part.size_bytes for part in parts]
        # All arrival times are computed at once: a part waits for the bandwidth, not for the arrival of others.
        due_s = [self.link.due_s(size) for size in sizes]
        with self._asking():
            async with asyncio.timeout(timeout_s):
                await self._caches.send(list(zip(due_s, parts, strict=True)))
        return sum(sizes)

    async def cache_in_background(self, parts: Iterable[OutgoingPart]) -> int:
        """Send parts one by one, only while the link is idle, and at most half of the time. Returns the bytes sent.

        A part should have at most `background_bytes`, which follow the pace of the parts before. The pauses leave
        processor time to passes: on a fast link, both nodes would otherwise be busy with the caches.
        """
        sent_bytes = 0
        for part in parts:
            async with self._background:
                await self.link.idle()
                begun_s = time.monotonic()
                part_bytes = await self.cache([part])
                took_s = time.monotonic() - begun_s
                if 2 * part_bytes > self.background_bytes:  # a small rest says little of the pace
                    fitting = int(part_bytes / took_s * _BACKGROUND_S)
                    self.background_bytes = min(CHUNK_BYTES, max(_BACKGROUND_BYTES, fitting))
                await asyncio.sleep(took_s)
            sent_bytes += part_bytes
        return sent_bytes

    async def transfer_cache(self, request: TransferRequest, timeout_s: float = 60.0) -> TransferReply:
        """Have the node send a session's caches to other nodes."""
        with self._asking():
            reply = await self._calls.transfer_cache(request, timeout_s)
        if reply.bytes >= 2**53:
            raise self.fault(f"it says that it transferred {reply.bytes} bytes")
        return reply

    async def permit(self, session: str, permit: Permit, keep: bool, timeout_s: float = 5.0) -> dict[int, int]:
        """Have the node accept of a session what `permit` says, and nothing else.

        If an attempt begins with it, the node frees the session's caches, or with `keep` returns their positions by
        block. No pass of an older attempt can change them any more.
        """
        with self._asking():
            reply = await self._calls.permit(permit.to_wire(session, keep), timeout_s)
        return dict(reply.lengths)

    async def close_sessions(self, sessions: list[str], timeout_s: float = 5.0) -> None:
        """Have the node free the caches of these sessions. A lost node has no caches, so its silence is no error."""
        with contextlib.suppress(NodeLostError), self._asking():
            await self._calls.close_sessions(CloseRequest(sessions=sessions), timeout_s)

    async def disconnect(self) -> None:
        """End all streams and the channel."""
        await asyncio.gather(self._steps.close(), self._caches.close(), self._calls.close())
        self._channel.close()

    def _greet(self, words: wire.Hello, asked_s: float) -> None:
        """Take a node's first words, for which it was asked at `asked_s` (seconds since 1970)."""
        if wrong := mismatch(self.name, Version.said(words.version), self.member.name):
            raise self.fault(wrong)
        try:
            found = {"nonce": words.nonce, "epoch": words.epoch, "clock_s": words.clock_s}
            self.hello = _HELLO.validate_python(found)
        except ValidationError as error:
            raise self.fault(f"its first words cannot be read: {_first(error)}") from None
        self.clock_ahead_s = self.hello.clock_s - (asked_s + time.time()) / 2
        self._given_up = False

    def _check(self, token: Token) -> None:
        """PeerFaultError for a token that no model has, or for an error without a reason."""
        fits = len(token.session) <= MAX_NAME_CHARS and all(0 <= each < self.vocabulary for each in token.token_ids)
        fits = fits and are_logprobs(token.logprobs, self.vocabulary)
        if not fits or ((token.error or token.error_kind) and not _WORD.fullmatch(token.error_kind)):
            raise self.fault(f"it sent no token of a session: {list(token.token_ids)!r:.60}, {token.error_kind!r:.60}")

    def _parsed(self, adapter: TypeAdapter[_Answer], text: str, what: str) -> _Answer:
        if len(text) > _MAX_TEXT_CHARS:
            raise self.fault(f"{what} has {len(text)} characters, the limit is {_MAX_TEXT_CHARS}")
        try:
            return adapter.validate_json(text)
        except ValidationError as error:
            raise self.fault(f"{what} cannot be read: {_first(error)}") from None

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Around a call: NodeLostError if the peer does not answer, PeerFaultError for an answer of no node."""
        try:
            yield
        except ResplitError:
            raise
        except GRPCError as error:
            if error.status not in _NO_FAULT:
                says = f"it answers {error.status.name}: {error.message or ''!s:.200}; is it of the same version?"
                raise self.fault(says) from error
            raise self._lost(error) from error
        except _CONNECTION_ERRORS as error:
            raise self._lost(error) from error
        except Exception as error:  # grpclib and protobuf raise errors of any kind for what they cannot read
            raise self.fault(f"its answer cannot be read ({type(error).__name__}: {error!s:.200})") from error

    def _lost(self, error: Exception) -> NodeLostError:
        return NodeLostError(f"{self.name} at {self.address} does not answer ({type(error).__name__}: {error})")


def _first(error: ValidationError) -> str:
    """The first place that does not fit, and why, in at most 300 characters."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "all of it"
    return f"{place}: {first['msg']}"[:300]
