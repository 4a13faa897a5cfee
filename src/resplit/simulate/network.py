"""The links between machines: latency, bandwidth, losses and outages, which may change over time.

A link delivers in order. Messages queue for its bandwidth, then travel for its latency. A lost message is sent again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from resplit.config import LinkShape
from resplit.phases import LinkState

__all__ = ["SimulatedNetwork"]

_LEAST_RETRY_S = 0.2  # TCP waits at least this long before it sends again (RFC 6298, as in Linux)


@dataclass
class _SimulatedLink:
    latency_s: float
    bandwidth_bytes_per_s: float
    free_s: float = 0.0
    last_due_s: float = 0.0
    background_free_s: float = 0.0
    loss: float = 0.0
    down_until_s: float = 0.0


class SimulatedNetwork:
    """The links of a cluster. `shape` gives the declared one of a pair; None between parts of one machine.

    `hop_s` is what the software adds to each message. Losses are drawn from `rng`.
    """

    def __init__(
        self, shape: Callable[[str, str], LinkShape | None], rng: np.random.Generator, hop_s: float = 0.0
    ) -> None:
        self._declared = shape
        self._rng = rng
        self._hop_s = hop_s
        self._links: dict[tuple[str, str], _SimulatedLink] = {}

    def due_s(self, one: str, other: str, payload_bytes: float, now_s: float) -> float:
        """When a message that is sent now arrives, after all earlier ones; infinite if the link is cut for good."""
        link = self._link(one, other)
        begin_s = max(now_s, link.free_s, link.down_until_s)
        link.free_s = begin_s + payload_bytes / link.bandwidth_bytes_per_s
        due_s = link.free_s + link.latency_s + self._hop_s + self._retries_s(link)
        link.last_due_s = max(due_s, link.last_due_s)
        return link.last_due_s

    def background_due_s(self, one: str, other: str, payload_bytes: float, now_s: float) -> float:
        """When this many bytes arrive that are sent in the background: messages overtake them, and do not wait."""
        link = self._link(one, other)
        begin_s = max(now_s, link.background_free_s, link.free_s, link.down_until_s)
        link.background_free_s = begin_s + payload_bytes / link.bandwidth_bytes_per_s
        return link.background_free_s + link.latency_s + self._hop_s

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
