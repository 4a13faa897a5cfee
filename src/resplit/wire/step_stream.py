"""The stream of steps to one peer: in order, each acknowledged in the end, or passed to `on_lost` if the stream breaks.

An acknowledgement is a message of its own, and costs both sides as much as a step. So it is asked for now and then,
and counts for all steps before it.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from resplit.errors import CapacityError
from resplit.process.cancellation import cancel_and_wait
from resplit.wire import message_limits
from resplit.wire.addresses import Address
from resplit.wire.emulated_link import EmulatedLink, Sender
from resplit.wire.message_stream import MessageStream, connected
from resplit.wire.node_pb2 import Ack, Step

_log = structlog.get_logger(__name__)
# An acknowledgement is asked for with the first step after this time, and with each step of so many bytes: steps are
# kept until they are acknowledged.
_ASK_EVERY_S = 0.05
_LARGE_BYTES = 16 * 1024
_MOST_ACK_BYTES = 64
# A peer may leave so much unacknowledged, waiting here or sent. The oldest step for which an acknowledgement was asked
# waits so long at most: over the slowest usual link, the largest steps take less.
_MOST_STEPS = 4096
_MOST_BYTES = message_limits.MAX_MESSAGE_BYTES
_ACKNOWLEDGED_WITHIN_S = 60.0


@dataclass(frozen=True)
class Crossing:
    """The time from sending a step to a peer until its acknowledgement arrived."""

    peer: str
    payload_bytes: int
    round_trip_s: float


class StepStream:
    """Sends steps to one peer. The stream is opened by the first step, and by the first one after it broke."""

    def __init__(
        self,
        peer: str,
        address: Address,
        context: ssl.SSLContext,
        link: EmulatedLink,
        on_crossing: Callable[[Crossing], None],
        on_lost: Callable[[str, list[Step]], None],
    ) -> None:
        self._peer = peer
        self._address = address
        self._context = context
        self._link = link
        self._on_crossing = on_crossing
        self._on_lost = on_lost
        self._changing = threading.Lock()  # held while what is pending changes, and until a step is on its way
        self._queued = 0  # steps that wait in `_sender`, or are being sent
        self._pending: deque[tuple[float, Step]] = deque()  # sent and not yet acknowledged, the oldest first
        self._pending_bytes = 0  # of their values
        self._number = 0
        self._asked_s = -math.inf  # when an acknowledgement was asked for last
        self._sender: Sender[Step] | None = None
        self._stream: MessageStream[Ack] | None = None
        self._task: asyncio.Task[None] | None = None

    def send(self, step: Step) -> None:
        """Queue a step. If the stream breaks before an acknowledgement, it is passed to `on_lost`; it may have arrived.

        CapacityError if too many steps already wait for the peer, or too large ones. A stream whose peer acknowledges
        nothing any more is broken.
        """
        if self._sender is None or self._task is None or self._task.done():
            self._sender = Sender(self._link, self._send)
            self._task = asyncio.create_task(self._run(self._sender), name=f"steps to {self._peer}")
        with self._changing:
            self._number_next(step)
            self._sender.put(step, len(step.values.data))
            self._queued += 1
            self._keep(step)

    def send_at_once(self, step: Step) -> bool:
        """Send a step now, in any thread, after all steps before it. Otherwise as `send`.

        False if it cannot go at once: the stream is not open, its link is emulated, or earlier steps wait.
        """
        with self._changing:
            stream = self._stream
            if stream is None or self._queued or self._link.shape is not None or not stream.is_ready():
                return False
            self._number_next(step)
            self._keep(step)
            stream.put(step)
        return True

    async def close(self) -> None:
        """End the stream."""
        if self._task is not None:
            await cancel_and_wait([self._task])

    def _number_next(self, step: Step) -> None:
        now_s, size = time.monotonic(), len(step.values.data)
        self._ensure_room(now_s, size)
        self._number += 1
        step.number = self._number
        step.acknowledge = size >= _LARGE_BYTES or now_s - self._asked_s >= _ASK_EVERY_S
        if step.acknowledge:
            self._asked_s = now_s
            self._end_if_overdue(now_s)

    def _keep(self, step: Step) -> None:
        """Keep a step until it is acknowledged."""
        self._pending.append((time.monotonic(), step))
        self._pending_bytes += len(step.values.data)

    def _ensure_room(self, now_s: float, size_bytes: int) -> None:
        """CapacityError if a step of this size is too much beside those that are not acknowledged."""
        steps = len(self._pending)
        if steps >= _MOST_STEPS or (steps and self._pending_bytes + size_bytes > _MOST_BYTES):
            self._end_if_overdue(now_s)
            raise CapacityError(f"{self._peer} has not acknowledged {steps} steps of {self._pending_bytes} bytes yet")

    def _end_if_overdue(self, now_s: float) -> None:
        """Break the stream if the peer has not acknowledged in time what it was asked to."""
        asked_s = next((sent_s for sent_s, step in self._pending if step.acknowledge), now_s)
        if self._stream is not None and now_s - asked_s > _ACKNOWLEDGED_WITHIN_S:
            _log.warning("steps are not acknowledged", peer=self._peer, waited_s=round(now_s - asked_s, 1))
            self._stream.abort()

    async def _run(self, sender: Sender[Step]) -> None:
        try:
            stream = await connected(Ack, _MOST_ACK_BYTES, self._peer, self._address, self._context)
            self._stream = stream
            sending = asyncio.create_task(sender.run())
            try:
                await stream.each(self._acknowledge)
                raise ConnectionResetError(f"{self._peer} closed its stream of steps")
            finally:
                stream.abort()
                await cancel_and_wait([sending])
        except Exception as error:  # also what `on_crossing` raises
            _log.info("a stream of steps broke", peer=self._peer, error=repr(error))
        with self._changing:
            lost = [step for _, step in self._pending]
            self._pending.clear()
            self._pending_bytes = self._queued = 0
            self._task, self._stream, self._asked_s = None, None, -math.inf
        self._on_lost(self._peer, lost)

    async def _send(self, steps: list[Step]) -> None:
        if self._stream is not None:
            await self._stream.send(steps)
        with self._changing:
            self._queued -= len(steps)

    def _acknowledge(self, ack: Ack) -> None:
        """Forget all steps up to this one. The peer may repeat itself, or name a step that it never got."""
        sent_s, size = math.nan, 0
        with self._changing:
            while self._pending and self._pending[0][1].number <= ack.number:
                begun_s, step = self._pending.popleft()
                self._pending_bytes -= len(step.values.data)
                if step.number == ack.number:
                    sent_s, size = begun_s, len(step.values.data)
        if not math.isnan(sent_s):
            self._on_crossing(Crossing(self._peer, size, time.monotonic() - sent_s))
