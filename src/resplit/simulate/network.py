"""The links between machines: latency, bandwidth, losses and outages, which may change over time.

A link delivers in order. Messages queue for its bandwidth, then travel for its latency. A lost message is sent again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from resplit.config import LinkShape
from resplit.phases import LinkState

__all__ = ["SimulatedNetwork"]

_LEAST_RETRY_S = 0.2  # TCP waits at least this long before it sends again (RFC 6298, as in Linux)


# As for nodes (`wire/peers.py`): a part of a background transfer has as many bytes as a link takes in so many seconds,
# and these at least and at most.
_PART_S = 0.013
_PART_BYTES = 64 * 1024.0, 256 * 1024.0


@dataclass(eq=False)
class BackgroundTransfer:
    """Bytes that cross a link in parts, from `since_s` on. `due_s`: when the last of those sent so far arrives."""

    left_bytes: float
    since_s: float
    due_s: float = math.inf

    def cancel(self) -> None:
        """Send no more parts."""
        self.left_bytes = 0.0


@dataclass
class _SimulatedLink:
    latency_s: float
    bandwidth_bytes_per_s: float
    free_s: float = 0.0
    last_due_s: float = 0.0
    background_free_s: float = 0.0
    loss: float = 0.0
    down_until_s: float = 0.0
    probed_until_s: float = 0.0
    part_bytes: float = _PART_BYTES[0]  # of the next part at most
    background: deque[BackgroundTransfer] = field(default_factory=deque)

    def begin_parts(self, until_s: float, hop_s: float) -> None:
        """Send the parts of background transfers that begin before `until_s`.

        They go one at a time, while no message waits, and at most half of the time.
        """
        while self.background:
            transfer = self.background[0]
            if transfer.left_bytes <= 0:
                self.background.popleft()
                continue
            begin_s = max(transfer.since_s, self.background_free_s, self.free_s, self.down_until_s)
            if begin_s >= until_s:
                return
            self._send_part(transfer, begin_s, hop_s)

    def _send_part(self, transfer: BackgroundTransfer, begin_s: float, hop_s: float) -> None:
        size = min(transfer.left_bytes, self.part_bytes)
        transfer.left_bytes -= size
        self.free_s = begin_s + size / self.bandwidth_bytes_per_s
        transfer.due_s = self.free_s + self.latency_s + hop_s
        took_s = transfer.due_s - begin_s
        self.background_free_s = transfer.due_s + took_s
        if 2 * size > self.part_bytes:  # a small rest says little of the pace
            self.part_bytes = min(max(size / took_s * _PART_S, _PART_BYTES[0]), _PART_BYTES[1])

    def alone(self) -> _SimulatedLink:
        """This link with what it sends in the background, without further messages."""
        return replace(self, background=deque(replace(each) for each in self.background))

    def parts_due_s(self, hop_s: float) -> float:
        """Send all parts, and say when the last one arrives."""
        last = self.background[-1]
        self.begin_parts(math.inf, hop_s)
        return last.due_s


class SimulatedNetwork:
    """The links of a cluster. `shape` gives the declared one of a pair; None between parts of one machine.

    `hop_s` is what the software adds to each message. Losses are drawn from `rng`. What is sent in the background goes
    `in_parts`, each of which delays messages, as on a cluster; else it delays none.
    """

    def __init__(
        self,
        shape: Callable[[str, str], LinkShape | None],
        rng: np.random.Generator,
        hop_s: float = 0.0,
        in_parts: bool = False,
    ) -> None:
        self._in_parts = in_parts
        self._declared = shape
        self._rng = rng
        self._hop_s = hop_s
        self._links: dict[tuple[str, str], _SimulatedLink] = {}

    def due_s(self, one: str, other: str, payload_bytes: float, now_s: float) -> float:
        """When a message that is sent now arrives, after all earlier ones; infinite if the link is cut for good."""
        link = self._link(one, other)
        link.begin_parts(now_s, self._hop_s)
        begin_s = max(now_s, link.free_s, link.down_until_s)
        link.free_s = begin_s + payload_bytes / link.bandwidth_bytes_per_s
        due_s = link.free_s + link.latency_s + self._hop_s + self._retries_s(link)
        link.last_due_s = max(due_s, link.last_due_s)
        return link.last_due_s

    def background_due_s(self, one: str, other: str, payload_bytes: float, now_s: float) -> float:
        """When this many bytes arrive that are sent in the background, if no message comes between.

        Messages overtake them. Without `in_parts` they do not even wait.
        """
        link = self._link(one, other)
        if self._in_parts:
            self.send_in_background(one, other, payload_bytes, now_s)
            return link.alone().parts_due_s(self._hop_s)
        begin_s = max(now_s, link.background_free_s, link.free_s, link.down_until_s)
        link.background_free_s = begin_s + payload_bytes / link.bandwidth_bytes_per_s
        return link.background_free_s + link.latency_s + self._hop_s

    def probe(self, one: str, other: str, payload_bytes: float, now_s: float) -> None:
        """A probe takes its time of the bandwidth, unless the one before it is under way or the link is cut."""
        link = self._link(one, other)
        if now_s < max(link.down_until_s, link.probed_until_s):
            return
        link.begin_parts(now_s, self._hop_s)
        link.free_s = max(now_s, link.free_s) + payload_bytes / link.bandwidth_bytes_per_s
        link.probed_until_s = link.free_s + 2 * link.latency_s

    def send_in_background(self, one: str, other: str, payload_bytes: float, now_s: float) -> BackgroundTransfer:
        """Begin to send these bytes in parts, after the background transfers of this link that wait already."""
        transfer = BackgroundTransfer(payload_bytes, now_s)
        self._link(one, other).background.append(transfer)
        return transfer

    def has_arrived(self, one: str, other: str, transfer: BackgroundTransfer, now_s: float) -> bool:
        """Whether all parts of a background transfer over this link have arrived."""
        self._link(one, other).begin_parts(now_s, self._hop_s)
        return transfer.left_bytes <= 0 and transfer.due_s <= now_s

    def seconds(self, one: str, other: str, payload_bytes: float, now_s: float) -> float:
        """The one-way time of a probe that is sent now. It waits for earlier messages, but delays none."""
        link = self._link(one, other)
        waits_s = max(0.0, link.free_s - now_s, link.down_until_s - now_s)
        return waits_s + payload_bytes / link.bandwidth_bytes_per_s + link.latency_s + self._hop_s

    def shape(self, one: str, other: str) -> LinkShape | None:
        """The link of a pair as it is now; None between parts of one machine."""
        link = self._links.get((one, other))
        if link is None or one == other:
            return self._declared(one, other)
        return LinkShape(latency=link.latency_s, bandwidth=link.bandwidth_bytes_per_s)

    def change(self, one: str, other: str, state: LinkState, down_until_s: float = 0.0) -> None:
        """Change a link in both directions, for the messages that are sent from now on.

        If it is down, they wait until `down_until_s`; infinite if it never comes back.
        """
        for link in (self._link(one, other), self._link(other, one)):
            link.latency_s, link.bandwidth_bytes_per_s = state.latency_s, state.bandwidth_bytes_per_s
            link.loss, link.down_until_s = state.loss, 0.0 if state.up else down_until_s

    def _link(self, one: str, other: str) -> _SimulatedLink:
        link = self._links.get((one, other))
        if link is None:
            shape = self._declared(one, other)
            link = _SimulatedLink(shape.latency, shape.bandwidth) if shape else _SimulatedLink(0.0, math.inf)
            self._links[one, other] = link
        return link

    def _retries_s(self, link: _SimulatedLink) -> float:
        """The delay by repetitions of a message that is lost with probability `loss` each time it is sent."""
        if not link.loss:
            return 0.0
        retry_s, total_s = max(_LEAST_RETRY_S, 2 * link.latency_s), 0.0
        while self._rng.random() < link.loss:
            total_s, retry_s = total_s + retry_s, 2 * retry_s
        return total_s
