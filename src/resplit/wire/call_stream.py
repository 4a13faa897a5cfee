"""The stream of calls to one peer: many may be under way, and one that is given up is called off at the peer.

It carries all calls but commands. A call over HTTP/2 takes several times the processor time
(docs/adr/0015-stream-of-steps.md).
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TypeVar, cast

from google.protobuf.message import Message
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from resplit.wire.addresses import Address
from resplit.wire.answered_stream import AnsweredStream
from resplit.wire.message_limits import MAX_ANSWER_BYTES
from resplit.wire.message_stream import Parsed
from resplit.wire.node_pb2 import (
    Answer,
    Call,
    CloseReply,
    CloseRequest,
    EchoReply,
    EchoRequest,
    MeasureReply,
    MeasureRequest,
    PermitReply,
    PermitRequest,
    ReportReply,
    ReportRequest,
    TransferReply,
    TransferRequest,
)

_Reply = TypeVar("_Reply", bound=Message)


class CallStream:
    """Makes calls to one peer.

    Each raises GRPCError if the peer refuses it, OSError if the stream breaks or cannot be opened, and TimeoutError if
    there is no answer in time. What the peer answers may be no answer: ValueError or DecodeError then.
    """

    def __init__(self, peer: str, address: Address, context: ssl.SSLContext) -> None:
        self._stream = AnsweredStream(
            "calls", Answer, lambda answer: answer.number, MAX_ANSWER_BYTES, peer, address, context
        )

    async def echo(self, request: EchoRequest, timeout_s: float) -> EchoReply:
        """Have the peer answer."""
        return await self._call("Echo", request, EchoReply, timeout_s)

    async def report(self, request: ReportRequest, timeout_s: float) -> ReportReply:
        """The peer's state, and its telemetry rows since the last report."""
        return await self._call("Report", request, ReportReply, timeout_s)

    async def measure(self, request: MeasureRequest, timeout_s: float) -> MeasureReply:
        """Have the peer measure links."""
        return await self._call("Measure", request, MeasureReply, timeout_s)

    async def transfer_cache(self, request: TransferRequest, timeout_s: float) -> TransferReply:
        """Have the peer send a session's caches to other nodes."""
        return await self._call("TransferCache", request, TransferReply, timeout_s)

    async def permit(self, request: PermitRequest, timeout_s: float) -> PermitReply:
        """Replace what the peer accepts of a session."""
        return await self._call("Permit", request, PermitReply, timeout_s)

    async def close_sessions(self, request: CloseRequest, timeout_s: float) -> CloseReply:
        """Have the peer free the caches of sessions."""
        return await self._call("Close", request, CloseReply, timeout_s)

    async def close(self) -> None:
        """End the stream, and the calls over it."""
        await self._stream.close()

    async def _call(self, name: str, request: Message, kind: type[_Reply], timeout_s: float) -> _Reply:
        content = request.SerializeToString()
        async with asyncio.timeout(timeout_s):
            opened = await self._stream.opened()
            await opened.stream.writable()
            with opened.awaiting() as (number, answer):
                opened.stream.put(Call(number=number, name=name, content=content))
                try:
                    answered = await answer
                finally:
                    if answer.cancelled():
                        opened.stream.put(Call(number=number))
        if answered.status:
            raise GRPCError(Status(answered.status), answered.error)
        return cast(_Reply, cast(Parsed, kind).FromString(answered.content))
