"""The estimated latency and bandwidth of each link, from messages of two sizes, relative to a cost model.

The latency is half of a message's round trip, so the two directions between two nodes have one latency, and both ends
measure it. A late message from one end is doubted if the other end's messages are as fast as usual.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from resplit.cost.model import CostModel
from resplit.estimate.change import Change
from resplit.estimate.forecast import Forecast, Reverting
from resplit.estimate.level import Level, age_s, log_ratio
from resplit.types import FloatArray, Problem

__all__ = ["LinkEstimate", "LinkEstimates", "bandwidth_ahead", "both_ways", "route_hops", "with_links"]

# Of the logarithm of a factor: noise of one message, drift in one second, and the least jump that is worth a plan.
_NOISE, _DRIFT, _LEAST = 0.1, 0.01, 0.7
# A message may be late by so much although nothing changed: a process had something else to do.
_HICCUP_S = 0.002
# A link that became slower is so at several moments. Messages that a busy host or a queue has delayed come together.
_MOMENTS, _APART_S = 3, 0.05
# The least jump that is worth a plan, in seconds for a probe of either size.
_LEAST_S = 0.01
SMALL_BYTES = 1024  # a smaller message shows the latency of a link, a larger one its bandwidth


@dataclass(frozen=True)
class LinkEstimate:
    """By which factors the cost model's latency and seconds per byte of a link from `node` to `peer` are wrong now.

    The last message that shows either came `age_s` seconds ago; None if none did. `log_transfer_ahead` is the logarithm
    of the factor by which a transfer is expected to become longer than it is now.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    node: str
    peer: str
    latency_factor: float = 1.0
    s_per_byte_factor: float = 1.0
    age_s: float | None = None
    log_transfer_ahead: Forecast | None = None


def with_links(problem: Problem, estimates: tuple[LinkEstimate, ...]) -> tuple[FloatArray, FloatArray]:
    """Latency and bandwidth of the problem's links (nodes, nodes), as they are estimated."""
    latency_s = problem.link_latency_s.copy()
    bandwidth = problem.link_bandwidth_bytes_per_s.copy()
    index = {node.name: i for i, node in enumerate(problem.nodes)}
    for link in estimates:
        if link.node in index and link.peer in index:
            place = index[link.node], index[link.peer]
            latency_s[place] *= link.latency_factor
            bandwidth[place] /= link.s_per_byte_factor
    return latency_s, bandwidth


def bandwidth_ahead(problem: Problem, estimates: tuple[LinkEstimate, ...]) -> FloatArray:
    """The expected bandwidth of the problem's links (nodes, nodes): at most the present one, which it has already."""
    bandwidth = problem.link_bandwidth_bytes_per_s.copy()
    index = {node.name: i for i, node in enumerate(problem.nodes)}
    for link in estimates:
        if link.log_transfer_ahead is not None and link.node in index and link.peer in index:
            bandwidth[index[link.node], index[link.peer]] /= math.exp(max(0.0, link.log_transfer_ahead.mean))
    return bandwidth


def _level() -> Level:
    return Level(_NOISE, _DRIFT, _LEAST, _MOMENTS, _APART_S)


@dataclass
class _SeenTime:
    """What was seen of the seconds per byte of a link."""

    level: Level = field(default_factory=_level)
    slower_s: float = -math.inf  # when it last became longer

    def log_factor(self, back: _SeenTime | None) -> float:
        """The level, and at least that of the way back while only that is known to have become longer.

        What slows down one direction mostly slows down both, and a plan must not move to the other one meanwhile.
        """
        unsure = back is not None and (self.level.doubted or self.level.seen_s <= back.slower_s)
        return max(self.level.mean, back.level.mean) if back and unsure else self.level.mean


@dataclass
class _SeenLatency:
    """What was seen of the latency between two nodes, which is `expected_s` by the cost model."""

    level: Level = field(default_factory=_level)
    expected_s: float | None = None


@dataclass
class _SeenLink:
    """What was seen of one link. `latency` is that of both directions."""

    latency: _SeenLatency
    s_per_byte: _SeenTime = field(default_factory=_SeenTime)
    small_s: deque[float] = field(default_factory=lambda: deque(maxlen=2))  # the last small messages
    log_s_per_byte: Reverting = field(default_factory=Reverting)
    expected_s_per_byte: float | None = None  # by the cost model

    @property
    def doubted(self) -> bool:
        """Whether it seems to have changed by its last messages."""
        return self.latency.level.doubted or self.s_per_byte.level.doubted


class LinkEstimates:
    """The estimates of all links of one cluster. Without a cost model it only collects."""

    def __init__(self) -> None:
        self._model: CostModel | None = None
        self._links: dict[tuple[str, str], _SeenLink] = {}
        self._latencies: dict[tuple[str, str], _SeenLatency] = {}  # by two nodes in order of their names
        self._doubted: dict[tuple[str, str], None] = {}  # a set in order: a large cluster has 40,000 links

    def set_model(self, model: CostModel) -> None:
        """Use a new cost model. What is known of each link is counted from its times."""
        self._model = model
        for pair, latency in self._latencies.items():
            before_s, latency.expected_s = latency.expected_s, self._expected_latency_s(pair)
            _shift(latency.level, before_s, latency.expected_s)
        for pair, link in self._links.items():
            before_s, link.expected_s_per_byte = link.expected_s_per_byte, self._expected_s_per_byte(pair)
            _shift(link.s_per_byte.level, before_s, link.expected_s_per_byte)

    def observe(self, node: str, peer: str, payload_bytes: float, seconds: float, at_s: float) -> list[Change]:
        """Take the one-way time of a probe; returns the jump that it reveals."""
        link = self._links.get((node, peer)) or self._new_link(node, peer)
        changes = self._observe(node, peer, link, payload_bytes, seconds, at_s)
        for pair in ((node, peer), (peer, node)):
            if pair in self._links and self._links[pair].doubted:
                self._doubted[pair] = None
            else:
                self._doubted.pop(pair, None)
        return changes

    def _new_link(self, node: str, peer: str) -> _SeenLink:
        ends = min(node, peer), max(node, peer)
        latency = self._latencies.get(ends)
        if latency is None:
            latency = self._latencies[ends] = _SeenLatency(expected_s=self._expected_latency_s(ends))
        link = _SeenLink(latency, expected_s_per_byte=self._expected_s_per_byte((node, peer)))
        self._links[node, peer] = link
        return link

    def _observe(
        self, node: str, peer: str, link: _SeenLink, payload_bytes: float, seconds: float, at_s: float
    ) -> list[Change]:
        expected_s_per_byte = link.expected_s_per_byte
        if payload_bytes < SMALL_BYTES:
            link.small_s.append(seconds)
            if at_s < link.latency.level.seen_s:  # the other end has measured since
                return []
            what = f"the latency between {min(node, peer)} and {max(node, peer)}"
            return _observed(what, link.latency.level, seconds, link.latency.expected_s, at_s)
        small_s = min(link.small_s, default=math.inf)  # the other one may have been late
        if not small_s < seconds < math.inf:
            return []
        what = f"the transfer from {node} to {peer}"
        transfer_s = seconds - small_s
        seen, expected_s = link.s_per_byte, payload_bytes * (expected_s_per_byte or 0.0)
        changes = _observed(what, seen.level, transfer_s, expected_s, at_s)
        if any(change.is_slower for change in changes):
            seen.slower_s = at_s
        if expected_s_per_byte:
            link.log_s_per_byte.observe(link.s_per_byte.level.mean + math.log(expected_s_per_byte), at_s)
        return changes

    def doubted(self) -> list[tuple[str, str]]:
        """The links that seem to have changed by their last messages: they should be measured again at once."""
        return list(self._doubted)

    def estimates(self, at_s: float) -> tuple[LinkEstimate, ...]:
        """The estimate of each link that was measured, at `at_s`."""
        return tuple(self._estimate(pair, link, at_s) for pair, link in self._links.items())

    def _estimate(self, pair: tuple[str, str], link: _SeenLink, at_s: float) -> LinkEstimate:
        back = self._links.get((pair[1], pair[0]))
        return LinkEstimate(
            *pair,
            math.exp(link.latency.level.mean),
            math.exp(link.s_per_byte.log_factor(back.s_per_byte if back else None)),
            age_s(at_s, link.latency.level, link.s_per_byte.level),
            self._transfer_ahead(link, at_s),
        )

    def _transfer_ahead(self, link: _SeenLink, at_s: float) -> Forecast | None:
        expected_s_per_byte = link.expected_s_per_byte
        if not expected_s_per_byte or not link.s_per_byte.level.known:
            return None
        now = link.s_per_byte.level.mean + math.log(expected_s_per_byte)
        forecast = link.log_s_per_byte.forecast(now, at_s)
        return Forecast(forecast.mean - now, forecast.deviation)

    def _expected_latency_s(self, ends: tuple[str, str]) -> float | None:
        """The mean latency of both directions by the cost model; None where it has none."""
        links = [self._model.link(*pair) for pair in (ends, ends[::-1])] if self._model else []
        known = [link.latency_s for link in links if link and link.latency_s]
        return sum(known) / len(known) if known else None

    def _expected_s_per_byte(self, pair: tuple[str, str]) -> float | None:
        link = self._model.link(*pair) if self._model else None
        return 1 / link.bandwidth_bytes_per_s if link else None


def _shift(level: Level, before_s: float | None, expected_s: float | None) -> None:
    """Count what was seen from another expected time."""
    if before_s and expected_s and before_s != expected_s:
        level.shift(math.log(before_s / expected_s))


def _observed(what: str, level: Level, seconds: float, expected_s: float | None, at_s: float) -> list[Change]:
    """Let a level take a measured time, of which the cost model expects `expected_s`."""
    log_factor = log_ratio(seconds, expected_s)
    if log_factor is None or not expected_s:
        return []
    if not level.known:  # the model was fitted to such messages; a first one may be late
        level.restart(0.0)
    before = level.mean
    if not level.observe(log_factor, at_s, _HICCUP_S / max(seconds, expected_s)):
        return []
    if expected_s * abs(math.exp(level.mean) - math.exp(before)) < _LEAST_S:
        return []
    return [Change(at_s, what, "time", math.exp(before), math.exp(level.mean), level.deviation(at_s))]


def both_ways(links: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The links and their ways back, each once: what changes a link in one direction often does so in the other."""
    return list(dict.fromkeys(pair for one, other in links for pair in ((one, other), (other, one))))


def route_hops(source: str, nodes: tuple[str, ...]) -> list[tuple[str, str]]:
    """The links that a pass crosses: from the source through the nodes of its segments and back."""
    stops = [source, *nodes, source]
    return [(one, other) for one, other in itertools.pairwise(stops) if one != other]
