"""The connection to one node: a mutual TLS channel for calls, a stream of steps and a stream of tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpclib.client import Channel
from grpclib.config import Configuration
from pydantic import TypeAdapter, ValidationError

from resplit.errors import CapacityError, DataError, NodeLostError, error_from_wire
from resplit.status import NodeReport
from resplit.wire.addresses import Address
from resplit.wire.links import Link, until
from resplit.wire.node_grpc import NodeStub
from resplit.wire.node_pb2 import (
    AttemptRequest,
    CachePart,
    CloseRequest,
    CommandRequest,
    EchoRequest,
    ReportRequest,
    Step,
    Token,
    TokensRequest,
    TransferReply,
    TransferRequest,
)
from resplit.wire.step_stream import CONNECTION_ERRORS, Crossing, StepStream

# A larger part of a cache would delay the other streams of the HTTP/2 connection.
CHUNK_BYTES = 256 * 1024
# A background part delays a step by the time of this many bytes at most: about 13 ms at 40 Mbit/s.
BACKGROUND_BYTES = 64 * 1024
_WINDOW_BYTES = 8 * 2**20
_REPORT = TypeAdapter(NodeReport)


@dataclass
class Peer:
    """A node to which this member connects with the certificate in `context`. `link` delays the messages to it.

    Every call raises NodeLostError if the peer does not answer. `on_crossing` gets the time of each acknowledged
    step; `on_lost` gets the peer's name and the steps that were not acknowledged when their stream broke.
    """

    name: str
    address: Address
    context: ssl.SSLContext
    link: Link = field(default_factory=Link)
    on_crossing: Callable[[Crossing], None] = lambda crossing: None
    on_lost: Callable[[str, list[Step]], None] = lambda name, steps: None

    def __post_init__(self) -> None:
        config = Configuration(
            ssl_target_name_override=self.name,
            http2_connection_window_size=_WINDOW_BYTES,
            http2_stream_window_size=_WINDOW_BYTES,
        )
        self._channel = Channel(self.address.host, self.address.port, ssl=self.context, config=config)
        self._stub = NodeStub(self._channel)
        self._background = asyncio.Lock()
        self._steps = StepStream(
            self.name,
            self._stub,
            self.link,
            lambda crossing: self.on_crossing(crossing),  # the owner may replace both later
            lambda name, steps: self.on_lost(name, steps),
        )

    def send(self, step: Step) -> None:
        """Queue a step. The peer acknowledges it, or it is passed to `on_lost` if the connection breaks.

        CapacityError if too many steps already wait for the peer.
        """
        self._steps.send(step)

    async def command(self, kind: str, signed: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Send a signed command and return the reply. Raises the error with which the node refuses it."""
        with self._lost_if_silent():
            reply = await self._stub.Command(CommandRequest(kind=kind, signed=signed), timeout=timeout_s)
        if reply.error_kind:
            raise error_from_wire(reply.error_kind, f"{self.name}: {reply.error}")
        body: dict[str, Any] = json.loads(reply.body or "{}")
        return body

    async def report(self, after: int, timeout_s: float = 5.0) -> tuple[NodeReport, int]:
        """The node's state and its telemetry rows numbered above `after`, and the number of the last row.

        DataError if the answer is not a report.
        """
        with self._lost_if_silent():
            reply = await self._stub.Report(ReportRequest(after=after), timeout=timeout_s)
        try:
            return _REPORT.validate_json(reply.body), reply.last
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its answer"
            raise DataError(f"{self.name}: the report cannot be read: {place}: {first['msg']}") from None

    async def echo_s(self, payload_bytes: int, timeout_s: float = 10.0) -> float:
        """Round trip of a message of this size and an empty answer, in seconds."""
        begun_s = time.monotonic()
        await self.link.cross(payload_bytes)
        with self._lost_if_silent():
            await self._stub.Echo(EchoRequest(payload=bytes(payload_bytes)), timeout=timeout_s)
        return time.monotonic() - begun_s

    async def tokens(self, on_open: Callable[[], None] = lambda: None) -> AsyncIterator[Token]:
        """Every token (or error) that the node sends to this gateway; `on_open` is called once the stream is open.

        Raises NodeLostError when the stream breaks.
        """
        with self._lost_if_silent():
            async with self._stub.Tokens.open() as stream:
                await stream.send_message(TokensRequest(), end=True)
                await stream.recv_initial_metadata()
                on_open()
                async for token in stream:
                    yield token
        raise NodeLostError(f"{self.name} at {self.address} closed its stream of tokens")

    async def cache(self, parts: Sequence[CachePart], timeout_s: float = 60.0) -> int:
        """Send parts of caches to the node. Returns the bytes sent. CapacityError if the node refuses a part."""
        # All arrival times are computed at once: a part waits for the bandwidth, not for the arrival of others.
        due_s = [self.link.due_s(len(part.values.data)) for part in parts]
        with self._lost_if_silent():
            async with self._stub.Cache.open(timeout=timeout_s) as stream:
                for part, arrives_s in zip(parts, due_s, strict=True):
                    await until(arrives_s)
                    await stream.send_message(part)
                await stream.end()
                reply = await stream.recv_message()
        if reply is None or reply.error:
            raise CapacityError(f"{self.name}: {reply.error if reply else 'no answer after parts of a cache'}")
        return sum(len(part.values.data) for part in parts)

    async def cache_in_background(self, parts: Iterable[CachePart]) -> int:
        """Send parts as `cache` does, in small batches, only while the link is idle, and at most half of the time.

        The pauses leave processor time to passes: on a fast link, both nodes would otherwise be busy with the caches.
        """
        sent_bytes = 0
        for batch in _batches(parts):
            async with self._background:
                await self.link.idle()
                begun_s = time.monotonic()
                sent_bytes += await self.cache(batch)
                await asyncio.sleep(time.monotonic() - begun_s)
        return sent_bytes

    async def transfer_cache(self, request: TransferRequest, timeout_s: float = 60.0) -> TransferReply:
        """Have the node send a session's caches to other nodes."""
        with self._lost_if_silent():
            reply: TransferReply = await self._stub.TransferCache(request, timeout=timeout_s)
        return reply

    async def begin_attempt(self, session: str, attempt: int, timeout_s: float = 5.0) -> dict[int, int]:
        """Have the node refuse messages of older attempts. Returns the cached positions of the session, by block."""
        with self._lost_if_silent():
            reply = await self._stub.Attempt(AttemptRequest(session=session, attempt=attempt), timeout=timeout_s)
        return dict(reply.lengths)

    async def close_sessions(self, sessions: list[str], timeout_s: float = 5.0) -> None:
        """Have the node free the caches of these sessions. A lost node has no caches, so its silence is no error."""
        with contextlib.suppress(*CONNECTION_ERRORS):
            await self._stub.Close(CloseRequest(sessions=sessions), timeout=timeout_s)

    async def disconnect(self) -> None:
        """End all streams and the channel."""
        await self._steps.close()
        self._channel.close()

    @contextlib.contextmanager
    def _lost_if_silent(self) -> Iterator[None]:
        try:
            yield
        except CONNECTION_ERRORS as error:
            raise NodeLostError(
                f"{self.name} at {self.address} does not answer ({type(error).__name__}: {error})"
            ) from error


def _batches(parts: Iterable[CachePart]) -> Iterator[list[CachePart]]:
    """The parts in lists of at most `BACKGROUND_BYTES` each, or of one part. Made lazily."""
    batch: list[CachePart] = []
    size = 0
    for part in parts:
        if batch and size + len(part.values.data) > BACKGROUND_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += len(part.values.data)
    if batch:
        yield batch
