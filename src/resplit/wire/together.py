"""Several messages of a gRPC stream in one write.

A write costs both sides about as much as the messages in it: encryption, system calls, and a turn of each event loop.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from typing import Any

_PREFIX = struct.Struct(">?I")  # of each message in gRPC: whether it is compressed, and its length


async def send_together(stream: Any, messages: Sequence[Any]) -> None:
    """Send messages over a stream of a client or of a server, in order.

    The client must have sent its request before, the server its initial metadata. Raises what grpclib raises if the
    connection breaks.
    """
    content = [stream._codec.encode(message, stream._send_type) for message in messages]
    with getattr(stream, "_wrapper", contextlib.nullcontext()):  # it ends a client's call whose stream breaks
        await stream._stream.send_data(b"".join(_PREFIX.pack(False, len(each)) + each for each in content))
