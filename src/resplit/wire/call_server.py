"""Serves the calls that come over streams, each in a task: it ends with its stream, or when its caller gives it up."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import structlog
from google.protobuf.message import DecodeError
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from resplit.errors import CapacityError, DataError
from resplit.wire import message_limits
from resplit.wire.message_stream import MessageStream
from resplit.wire.node_pb2 import Answer, Call
from resplit.wire.patience import Patience
from resplit.wire.plain_messages import ensure_plain

_log = structlog.get_logger(__name__)
# The longest call is an echo, of 32 KiB.
MOST_CALL_BYTES = 2**20
# Calls under way over one stream. The gateway has a few for each session.
_MOST_UNDER_WAY = 4096
# So many calls of one member are taken at once, and in each second. Those of a flood are read later.
_AT_ONCE, _PER_S = 4000, 2000
_MOST_ERROR_CHARS = 500


class ServedCall:
    """A call with its one message, in the form in which gRPC's handlers expect it."""

    def __init__(self, call: Call, request: Any, stream: MessageStream[Call]) -> None:
        self.stream = stream
        self._number = call.number
        self._request = request

    @property
    def caller(self) -> str:
        """The member that made it, by its certificate."""
        return self.stream.member

    async def recv_message(self) -> Any:
        """The request, and None after that. A handler that waits need not keep it."""
        request, self._request = self._request, None
        return request

    async def send_message(self, reply: Any) -> None:
        """Answer."""
        await self.stream.send([Answer(number=self._number, content=reply.SerializeToString())])


def caller_of(call: Stream[Any, Any] | ServedCall) -> str:
    """The member that made a call, by its certificate."""
    return call.caller if isinstance(call, ServedCall) else message_limits.caller_of(call)


class CallServer:
    """`handlers` serve the calls, by name. `throttle` is awaited, with the caller's name, before a call is refused."""

    def __init__(self, handlers: Mapping[str, Handler], throttle: Callable[[str], Awaitable[None]]) -> None:
        self._handlers = handlers
        self._throttle = throttle
        self._patience = defaultdict[str, Patience](lambda: Patience(_AT_ONCE, _PER_S))

    async def serve(self, stream: MessageStream[Call]) -> None:
        """Serve the calls of one stream until it ends; DataError or CapacityError if its member ends it by a fault."""
        under_way: dict[int, asyncio.Task[None]] = {}
        try:
            await stream.each(lambda call: self._take(call, stream, under_way))
        finally:
            for task in under_way.values():
                task.cancel()

    def _take(self, call: Call, stream: MessageStream[Call], under_way: dict[int, asyncio.Task[None]]) -> None:
        if wait_s := self._patience[stream.member].note(time.monotonic()):
            stream.rest(wait_s)
        if not call.name:
            if task := under_way.pop(call.number, None):
                task.cancel()
            return
        if call.number in under_way:
            raise DataError(f"{stream.member} has two calls of the number {call.number}")
        if len(under_way) >= _MOST_UNDER_WAY:
            raise CapacityError(f"{stream.member} has {len(under_way)} calls under way")
        task = under_way[call.number] = asyncio.create_task(self._serve(call, stream))
        number = call.number

        def forget(done: asyncio.Task[None]) -> None:
            if under_way.get(number) is done:
                del under_way[number]

        task.add_done_callback(forget)

    async def _serve(self, call: Call, stream: MessageStream[Call]) -> None:
        """Answer one call."""
        try:
            handler = self._handlers.get(call.name)
            if handler is None:
                raise GRPCError(Status.UNIMPLEMENTED, "there is no such call")
            served = ServedCall(call, _request(handler, call.content), stream)
            call.ClearField("content")
            await handler.func(served)
        except GRPCError as error:
            refusal = error
        except Exception:
            _log.exception("a call failed because of a defect", call=call.name, caller=stream.member)
            refusal = GRPCError(Status.UNKNOWN, "internal error")
        else:
            return
        await self._throttle(stream.member)
        reason = (refusal.message or "")[:_MOST_ERROR_CHARS]
        await stream.send([Answer(number=call.number, status=refusal.status.value, error=reason)])


def _request(handler: Handler, content: bytes) -> Any:
    """The request in a call; INVALID_ARGUMENT if it has none."""
    try:
        ensure_plain(handler.request_type, content)
        return cast(Any, handler.request_type).FromString(content)
    except DecodeError:
        raise GRPCError(Status.INVALID_ARGUMENT, "these bytes are not a message of this call") from None
