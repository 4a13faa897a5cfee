"""gRPC's end of a connection, which lets others have their turn and keeps little for a peer that reads nothing.

grpclib itself handles all frames that have arrived at once, and answers some of them whether or not the peer reads.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from grpclib.protocol import H2Protocol

from resplit.wire.patience import Patience

# What arrives is handled in pieces, and after so many seconds of it the rest of the event loop has its turn.
_PIECE_BYTES = 4 * 1024
_TURN_S = 0.005
# The time for the frames of one connection, in seconds: at once, and in each second. Tokens and caches take much less;
# tiny frames without end would take all. It is on the clock, as on a busy machine the others wait for all of it.
_AT_ONCE_S, _PER_S = 1.0, 0.4
# Flow control bounds the content of calls to less. More is answers to frames of a peer that does not read them.
_MOST_UNREAD_BYTES = 32 * 2**20


class PacedProtocol(H2Protocol):  # type: ignore[misc]  # grpclib has no types
    """Like grpclib's own one, but it handles a flood of frames slowly, and in many turns of the event loop.

    Connections with one `patience` share the time of one.
    """

    transport: asyncio.Transport

    def __init__(self, handler: Any, config: Any, h2_config: Any) -> None:
        super().__init__(handler, config, h2_config)
        self.patience = Patience(_AT_ONCE_S, _PER_S)
        self._received = bytearray()
        self._next_turn: asyncio.Handle | None = None  # in which the rest of it is handled

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Handle what has arrived, now or in the next turns."""
        self._received += data
        if self._next_turn is None:
            self._handle_some()

    def connection_lost(self, error: BaseException | None) -> None:
        """Forget what was not handled yet."""
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._received.clear()
        super().connection_lost(error)

    def _handle_some(self) -> None:
        self._next_turn = None
        begun_s = ended_s = time.monotonic()
        while self._received and (ended_s == begun_s or ended_s - begun_s < _TURN_S):
            if self.transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
                self.transport.abort()
                return
            piece = bytes(self._received[:_PIECE_BYTES])
            del self._received[:_PIECE_BYTES]
            super().data_received(piece)
            ended_s = time.monotonic()
        wait_s = self.patience.note(ended_s, ended_s - begun_s)
        if self._received or wait_s:
            self.transport.pause_reading()
            self._next_turn = asyncio.get_running_loop().call_later(wait_s, self._handle_some)
        else:
            self.transport.resume_reading()
