"""Limits on incoming messages: their size, and their form.

grpclib itself reads as many bytes as the other side announces, up to 4 GiB, and treats malformed messages as a defect
of the server.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError
from grpclib.client import Channel
from grpclib.client import Stream as Call
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

# The hidden states of a whole prompt are one message: 4096 tokens of width 16384 in fp32.
MAX_MESSAGE_BYTES = 256 * 2**20
# The longest answer is a report with all the rows that a node keeps: about 4 MiB.
MAX_ANSWER_BYTES = 16 * 2**20


class BoundedChannel(Channel):  # type: ignore[misc]  # grpclib has no types here
    """A channel to a server whose answers are limited too: DecodeError for one of more than `MAX_ANSWER_BYTES`."""

    def request(self, *arguments: Any, **named: Any) -> Any:
        """A call whose answers are limited."""
        call = super().request(*arguments, **named)
        call.__class__ = _BoundedCall  # `Channel` offers no other way to choose the class
        return call


class _BoundedCall(Call):  # type: ignore[misc]
    async def send_request(self, *, end: bool = False) -> None:
        await super().send_request(end=end)
        incoming: Any = self._stream
        receive = incoming.recv_data

        async def receive_bounded(size: int) -> bytes:
            if size > MAX_ANSWER_BYTES:
                raise DecodeError(f"an answer of {size} bytes is too long")
            content: bytes = await receive(size)
            return content

        incoming.recv_data = receive_bounded


def limited(mapping: dict[str, Handler]) -> dict[str, Handler]:
    """Limit the handlers of a service: INVALID_ARGUMENT for a malformed message, RESOURCE_EXHAUSTED for a long one."""
    return {path: handler._replace(func=_limited(handler.func)) for path, handler in mapping.items()}


def _limited(handle: Any) -> Any:
    async def limited_handle(stream: Stream[Any, Any]) -> None:
        incoming: Any = stream._stream
        receive, in_message = incoming.recv_data, False

        async def receive_bounded(size: int) -> bytes:
            nonlocal in_message
            if size > MAX_MESSAGE_BYTES:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, f"a message of {size} bytes is too long")
            try:
                content: bytes = await receive(size)
            except AssertionError:  # grpclib raises it for a truncated message
                raise _malformed() from None
            if in_message and len(content) != size:  # the stream ended between a message's length and the message
                raise _malformed()
            in_message = not in_message
            return content

        incoming.recv_data = receive_bounded
        try:
            await handle(stream)
        except (DecodeError, NotImplementedError):  # malformed, or compressed
            raise _malformed() from None

    return limited_handle


async def receive_one(stream: Stream[Any, Any]) -> Any:
    """The message of a call with exactly one message; GRPCError if the caller sent none."""
    message = await stream.recv_message()
    if message is None:
        raise _malformed()
    return message


def _malformed() -> GRPCError:
    return GRPCError(Status.INVALID_ARGUMENT, "these bytes are not a message of this call")
