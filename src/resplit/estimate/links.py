"""The estimated latency and bandwidth of each link, from messages of two sizes, relative to a cost model."""

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
    """The expected bandwidth of the problem's links (nodes, nodes); `with_links` has put the present one in."""
    bandwidth = problem.link_bandwidth_bytes_per_s.copy()
    index = {node.name: i for i, node in enumerate(problem.nodes)}
    for link in estimates:
        if link.log_transfer_ahead is not None and link.node in index and link.peer in index:
            bandwidth[index[link.node], index[link.peer]] /= math.exp(link.log_transfer_ahead.mean)
    return bandwidth


@dataclass
class _SeenTime:
    """What was seen of the latency or of the seconds per byte of a link."""

    level: Level = field(default_factory=lambda: Level(_NOISE, _DRIFT, _LEAST, _MOMENTS, _APART_S))
    slower_s: float = -math.inf  # when it last became longer

    def log_factor(self, back: _SeenTime | None) -> float:
        """The level, and at least that of the way back while only that is known to have become longer.

        What slows down one direction mostly slows down both, and a plan must not move to the other one meanwhile.
        """
        unsure = back is not None and (self.level.doubted or self.level.seen_s <= back.slower_s)
        return max(self.level.mean, back.level.mean) if back and unsure else self.level.mean


@dataclass
class _SeenLink:
    """What was seen of one link."""

    latency: _SeenTime = field(default_factory=_SeenTime)
    s_per_byte: _SeenTime = field(default_factory=_SeenTime)
    small_s: deque[float] = field(default_factory=lambda: deque(maxlen=2))  # the last small messages
    log_s_per_byte: Reverting = field(default_factory=Reverting)
    expected: tuple[float | None, float | None] = (None, None)  # latency and seconds per byte by the cost model

    @property
    def doubted(self) -> bool:
        """Whether it seems to have changed by its last messages."""
        return self.latency.level.doubted or self.s_per_byte.level.doubted


class LinkEstimates:
    """The estimates of all links of one cluster. Without a cost model it only collects."""

    def __init__(self) -> None:
        self._model: CostModel | None = None
        self._links: dict[tuple[str, str], _SeenLink] = {}
        self._doubted: dict[tuple[str, str], None] = {}  # a set in order: a large cluster has 40,000 links

    def set_model(self, model: CostModel) -> None:
        """Use a new cost model. What is known of each link is counted from its times."""
        self._model = model
        for pair, link in self._links.items():
            before, link.expected = link.expected, self._expected(pair)
            if link.expected == before:
                continue
            for seen, old, new in zip((link.latency, link.s_per_byte), before, link.expected, strict=True):
                if old and new:
                    seen.level.shift(math.log(old / new))

    def observe(self, node: str, peer: str, payload_bytes: float, seconds: float, at_s: float) -> list[Change]:
        """Take the one-way time of a probe; returns the jump that it reveals."""
        link = self._links.get((node, peer))
        if link is None:
            link = self._links[node, peer] = _SeenLink(expected=self._expected((node, peer)))
        changes = self._observe(node, peer, link, payload_bytes, seconds, at_s)
        if link.doubted:
            self._doubted[node, peer] = None
        else:
            self._doubted.pop((node, peer), None)
        return changes

    def _observe(
        self, node: str, peer: str, link: _SeenLink, payload_bytes: float, seconds: float, at_s: float
    ) -> list[Change]:
        expected_s, expected_s_per_byte = link.expected
        if payload_bytes < SMALL_BYTES:
            link.small_s.append(seconds)
            return _observed(f"the latency from {node} to {peer}", link.latency, seconds, expected_s, at_s)
        small_s = min(link.small_s, default=math.inf)  # the other one may have been late
        if not small_s < seconds < math.inf:
            return []
        what = f"the transfer from {node} to {peer}"
        transfer_s = seconds - small_s
        changes = _observed(what, link.s_per_byte, transfer_s, payload_bytes * (expected_s_per_byte or 0.0), at_s)
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
            math.exp(link.latency.log_factor(back.latency if back else None)),
            math.exp(link.s_per_byte.log_factor(back.s_per_byte if back else None)),
            age_s(at_s, link.latency.level, link.s_per_byte.level),
            self._transfer_ahead(link, at_s),
        )

    def _transfer_ahead(self, link: _SeenLink, at_s: float) -> Forecast | None:
        expected_s_per_byte = link.expected[1]
        if not expected_s_per_byte or not link.s_per_byte.level.known:
            return None
        now = link.s_per_byte.level.mean + math.log(expected_s_per_byte)
        forecast = link.log_s_per_byte.forecast(now, at_s)
        return Forecast(forecast.mean - now, forecast.deviation)

    def _expected(self, pair: tuple[str, str]) -> tuple[float | None, float | None]:
        """Latency and seconds per byte by the cost model; None where it has none."""
        link = self._model.link(*pair) if self._model else None
        return (link.latency_s or None, 1 / link.bandwidth_bytes_per_s) if link else (None, None)


def _observed(what: str, seen: _SeenTime, seconds: float, expected_s: float | None, at_s: float) -> list[Change]:
    """Let a level take a measured time, of which the cost model expects `expected_s`."""
    level, log_factor = seen.level, log_ratio(seconds, expected_s)
    if log_factor is None or not expected_s:
        return []
    if not level.known:  # the model was fitted to such messages; a first one may be late
        level.restart(0.0)
    before = level.mean
    if not level.observe(log_factor, at_s, _HICCUP_S / max(seconds, expected_s)):
        return []
    if level.mean > before:
        seen.slower_s = at_s
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
