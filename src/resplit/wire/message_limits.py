"""What a call lets in: no message longer than one may be, and nothing that is none.

grpclib itself reads as much as a caller announces, up to 4 GiB, and takes bytes that are no message for a defect.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

# The hidden states of a whole prompt are one message: 4096 tokens of width 16384 in fp32.
MAX_MESSAGE_BYTES = 256 * 2**20


def limited(mapping: dict[str, Handler]) -> dict[str, Handler]:
    """The handlers of a service, each refusing with INVALID_ARGUMENT or RESOURCE_EXHAUSTED what it cannot read."""
    return {path: handler._replace(func=_limited(handler.func)) for path, handler in mapping.items()}


def _limited(handle: Any) -> Any:
    async def limited_handle(stream: Stream[Any, Any]) -> None:
        incoming: Any = stream._stream
        receive, inside = incoming.recv_data, False

        async def receive_bounded(size: int) -> bytes:
            nonlocal inside
            if size > MAX_MESSAGE_BYTES:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, f"{size} bytes are more than a message may have")
            try:
                content: bytes = await receive(size)
            except AssertionError:  # grpclib's word for a message that breaks off
                raise _no_message() from None
            if inside and len(content) != size:  # the end, between a message's length and the message
                raise _no_message()
            inside = not inside
            return content

        incoming.recv_data = receive_bounded
        try:
            await handle(stream)
        except (DecodeError, NotImplementedError):  # no such message; a compressed one
            raise _no_message() from None

    return limited_handle


async def receive_one(stream: Stream[Any, Any]) -> Any:
    """The one message of a call that has one; GRPCError where the caller sent none."""
    message = await stream.recv_message()
    if message is None:
        raise _no_message()
    return message


def _no_message() -> GRPCError:
    return GRPCError(Status.INVALID_ARGUMENT, "these bytes are no message of this call")
