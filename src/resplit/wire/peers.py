"""Connections to other members: one mutual TLS channel each, one long-lived stream of steps, and plain calls.

Knows how to reach a member and notices when it cannot; what steps and commands mean is for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.exceptions import GRPCError, StreamTerminatedError
from pydantic import TypeAdapter, ValidationError

from resplit.cancellation import cancel_and_wait
from resplit.errors import CapacityError, ConfigError, DataError, NodeLostError, error_from_wire
from resplit.model.engine import Activation
from resplit.status import NodeReport
from resplit.wire.links import Link, Sender, until
from resplit.wire.node_grpc import NodeStub
from resplit.wire.node_pb2 import (
    Ack,
    AttemptRequest,
    CachePart,
    CloseRequest,
    CommandRequest,
    EchoRequest,
    ReportRequest,
    Step,
    Tensor,
    Token,
    TokensRequest,
    TransferReply,
    TransferRequest,
)

_log = structlog.get_logger(__name__)
CONNECTION_ERRORS = (OSError, GRPCError, StreamTerminatedError, asyncio.TimeoutError)
_REPORT = TypeAdapter(NodeReport)
# Tensors above this are no use on one HTTP/2 stream: they would hold up the others.
CHUNK_BYTES = 256 * 1024
# What may hold up a step: some 13 ms at 40 Mbit/s.
BACKGROUND_BYTES = 64 * 1024


@dataclass(frozen=True)
class Address:
    """Where a member listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `host:port`; ConfigError if it is not that."""
        host, separator, port = text.rpartition(":")
        if not (separator and host and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(repr(text), "is not host:port")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass
class Crossing:
    """How long one step was on its way to a peer and its acknowledgement back."""

    peer: str
    payload_bytes: int
    round_trip_s: float


@dataclass
class Peer:
    """A member that this one talks to, as itself by `context`. `link` shapes what is sent to it."""

    name: str
    address: Address
    context: ssl.SSLContext
    link: Link = field(default_factory=Link)
    on_crossing: Callable[[Crossing], None] = lambda crossing: None
    on_lost: Callable[[str, list[Step]], None] = lambda name, steps: None

    def __post_init__(self) -> None:
        config = Configuration(
            ssl_target_name_override=self.name,
            http2_connection_window_size=8 * 2**20,
            http2_stream_window_size=8 * 2**20,
        )
        self._channel = Channel(self.address.host, self.address.port, ssl=self.context, config=config)
        self._stub = NodeStub(self._channel)
        self._background = asyncio.Lock()
        self._pending: dict[int, tuple[float, Step]] = {}
        self._number = 0
        self._sender: Sender[Step] | None = None
        self._task: asyncio.Task[None] | None = None

    def send(self, step: Step) -> None:
        """Queue a step; it is acknowledged, or handed to `on_lost` if the connection fails."""
        if self._task is None or self._task.done():
            self._open()
        assert self._sender is not None
        self._number += 1
        step.number = self._number
        self._sender.put(step, len(step.values.data))
        self._pending[step.number] = (time.monotonic(), step)

    async def command(self, kind: str, signed: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Send a signed command; its answer, or the error that the member answers with."""
        try:
            reply = await self._stub.Command(CommandRequest(kind=kind, signed=signed), timeout=timeout_s)
        except CONNECTION_ERRORS as error:
            raise self._lost(error) from error
        if not reply.error_kind:
            body: dict[str, Any] = json.loads(reply.body or "{}")
            return body
        raise error_from_wire(reply.error_kind, f"{self.name}: {reply.error}")

    async def report(self, after: int, timeout_s: float = 5.0) -> tuple[NodeReport, int]:
        """The node's state and its telemetry rows numbered above `after`, and the number of the last row.

        NodeLostError where it does not answer; DataError where its answer is not a report.
        """
        try:
            reply = await self._stub.Report(ReportRequest(after=after), timeout=timeout_s)
        except CONNECTION_ERRORS as error:
            raise self._lost(error) from error
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
        try:
            await self._stub.Echo(EchoRequest(payload=bytes(payload_bytes)), timeout=timeout_s)
        except CONNECTION_ERRORS as error:
            raise self._lost(error) from error
        return time.monotonic() - begun_s

    async def tokens(self, on_open: Callable[[], None] = lambda: None) -> AsyncIterator[Token]:
        """Every token (or error) that the member sends to this gateway; `on_open` is called once it will.

        Raises NodeLostError when the stream breaks.
        """
        try:
            async with self._stub.Tokens.open() as stream:
                await stream.send_message(TokensRequest(), end=True)
                await stream.recv_initial_metadata()
                on_open()
                async for token in stream:
                    yield token
        except CONNECTION_ERRORS as error:
            raise self._lost(error) from error
        raise NodeLostError(f"{self.name} at {self.address} closed its stream of tokens")

    async def cache(self, parts: Sequence[CachePart], timeout_s: float = 60.0) -> int:
        """Push parts of caches to the member; the bytes sent. NodeLostError, or ResplitError with what it answers."""
        # All are on their way at once: each waits for the bandwidth, none for the arrival of another.
        due_s = [self.link.due_s(len(part.values.data)) for part in parts]
        try:
            async with self._stub.Cache.open(timeout=timeout_s) as stream:
                for part, arrives_s in zip(parts, due_s, strict=True):
                    await until(arrives_s)
                    await stream.send_message(part)
                await stream.end()
                reply = await stream.recv_message()
        except CONNECTION_ERRORS as error:
            raise self._lost(error) from error
        if reply is None or reply.error:
            raise CapacityError(f"{self.name}: {reply.error if reply else 'no answer to a cache'}")
        return sum(len(part.values.data) for part in parts)

    async def cache_in_background(self, parts: Iterable[CachePart]) -> int:
        """Push parts as `cache` does, a few at a time, only while nothing else is on the link, and half of the time at
        most: on a fast link it is the processors at both ends that passes would have to wait for."""
        sent = 0
        for batch in _batches(parts):
            async with self._background:
                await self.link.idle()
                begun_s = time.monotonic()
                sent += await self.cache(batch)
                await asyncio.sleep(time.monotonic() - begun_s)
        return sent

    async def transfer_cache(self, request: TransferRequest, timeout_s: float = 60.0) -> TransferReply:
        """Have the member push a session's caches to other nodes."""
        try:
            reply: TransferReply = await self._stub.TransferCache(request, timeout=timeout_s)
            return reply
        except CONNECTION_ERRORS as error:
            raise self._lost(error) from error

    async def begin_attempt(self, session: str, attempt: int, timeout_s: float = 5.0) -> dict[int, int]:
        """Have the member refuse what is of older attempts; the positions that it holds of the session, by block."""
        try:
            reply = await self._stub.Attempt(AttemptRequest(session=session, attempt=attempt), timeout=timeout_s)
        except CONNECTION_ERRORS as error:
            raise self._lost(error) from error
        return dict(reply.lengths)

    async def close_sessions(self, sessions: list[str], timeout_s: float = 5.0) -> None:
        """Have the member free the caches of these sessions; a lost member has none."""
        with contextlib.suppress(*CONNECTION_ERRORS):
            await self._stub.Close(CloseRequest(sessions=sessions), timeout=timeout_s)

    async def disconnect(self) -> None:
        """End all streams and the channel."""
        if self._task is not None:
            await cancel_and_wait([self._task])
        self._channel.close()

    def _open(self) -> None:
        self._sender = Sender(self.link, self._send)
        self._connected: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(self._sender), name=f"steps to {self.name}")

    async def _send(self, step: Step) -> None:
        await self._stream.send_message(step)

    async def _run(self, sender: Sender[Step]) -> None:
        """Own the stream of steps until it breaks: then hand back what was not acknowledged."""
        try:
            async with self._stub.Steps.open() as self._stream, asyncio.TaskGroup() as tasks:
                await self._stream.send_request()
                tasks.create_task(sender.run())
                await self._receive()
                raise ConnectionResetError(f"{self.name} closed its stream of steps")
        except* CONNECTION_ERRORS as errors:
            _log.info("stream of steps broke", peer=self.name, error=repr(errors.exceptions[0]))
        lost = [step for _, step in self._pending.values()]
        self._pending.clear()
        self._task = None
        self.on_lost(self.name, lost)

    async def _receive(self) -> None:
        async for ack in self._stream:
            self._acknowledge(ack)

    def _acknowledge(self, ack: Ack) -> None:
        sent = self._pending.pop(ack.number, None)
        if sent is not None:
            sent_s, step = sent
            self.on_crossing(Crossing(self.name, len(step.values.data), time.monotonic() - sent_s))

    def _lost(self, error: BaseException) -> NodeLostError:
        return NodeLostError(f"{self.name} at {self.address} does not answer ({type(error).__name__}: {error})")


def _batches(parts: Iterable[CachePart]) -> Iterator[list[CachePart]]:
    """Parts in lists of up to `BACKGROUND_BYTES`, made as they are asked for."""
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


def to_wire(activation: Activation) -> Tensor:
    """An activation as a message."""
    return Tensor(dtype=activation.dtype, shape=activation.shape, data=activation.data)


def from_wire(tensor: Tensor) -> Activation:
    """A message as an activation; the engine checks it."""
    return Activation(tensor.dtype, tuple(tensor.shape), tensor.data)
