"""The present state of a cluster: the speed and background load of each node, and its links, by a cost model.

The cost model says how long a pass takes on each node. Each pass shows by which factor that is wrong now. The factor of
a node jumps when the node is throttled or freed; `Level` finds out. A new cost model already knows of earlier jumps, so
the factors are then computed again from the last passes.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from resplit.cost.fit import SpeedJump
from resplit.cost.model import CostModel
from resplit.cost.problem import MAX_BACKGROUND
from resplit.estimate.change import Change
from resplit.estimate.expected import ExpectedTimes
from resplit.estimate.forecast import Forecast, Reverting
from resplit.estimate.level import Level, age_s, log_ratio
from resplit.estimate.links import LinkEstimate, LinkEstimates, bandwidth_ahead, route_hops, with_links
from resplit.pass_times import PassTime, SegmentTime
from resplit.types import BlockFeatures, Problem

__all__ = ["ClusterEstimate", "Estimates", "NodeEstimate", "ahead", "speed_jumps", "under_estimates"]

# Of the logarithm of the factor: noise of one pass, drift in one second, and the least jump that is worth a plan.
_SPEED_NOISE, _SPEED_DRIFT, _SPEED_LEAST = 0.03, 0.01, 0.15
# A node that became slower is slower in the next batch, too: one batch may be late in whole.
_SPEED_MOMENTS, _SPEED_APART_S = 2, 0.02
# A pass may be late by so much although nothing changed: the host had something else to do.
_HICCUP_S = 0.005
_BACKGROUND_NOISE, _BACKGROUND_DRIFT, _BACKGROUND_LEAST = 0.03, 0.01, 0.1
_PASSES_KEPT = 8
_PASSES_S = 20.0  # older passes say no more than the models that were fitted to them since
_SAME_BATCH_S = 0.05  # passes of one batch end at most so long after one another
_FRESH_S = 1.0  # while a node computed passes within this time, its report about the reference layer is not needed


@dataclass(frozen=True)
class NodeEstimate:
    """What is estimated of one node.

    The cost model's times of it are wrong by `factor` now, which has the relative standard deviation `deviation`.
    `background_utilization` is the share of it that others use; None if that is not known. The last pass or report that
    shows either came `age_s` seconds ago; None if none did. `background_ahead` is what others will use. Its speed last
    jumped `jumped_s_ago`; None if it never did.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    factor: float = 1.0
    deviation: float = 0.0
    background_utilization: float | None = None
    age_s: float | None = None
    background_ahead: Forecast | None = None
    jumped_s_ago: float | None = None


@dataclass(frozen=True)
class Estimates:
    """What is estimated of a cluster now, relative to one cost model: its nodes by name, and its links.

    `rates_rps` are the requests per second that are expected, by class.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    nodes: Mapping[str, NodeEstimate] = field(default_factory=dict)
    links: tuple[LinkEstimate, ...] = ()
    rates_rps: Mapping[str, Forecast] = field(default_factory=dict)


def under_estimates(problem: Problem, estimates: Estimates) -> Problem:
    """The problem with the estimated times, background loads and links. It was posed with the same cost model."""
    known = [estimates.nodes.get(node.name, NodeEstimate()) for node in problem.nodes]
    factors = np.array([estimate.factor for estimate in known])  # (nodes,)
    nodes = tuple(
        node
        if estimate.background_utilization is None
        else replace(node, background_utilization=estimate.background_utilization)
        for node, estimate in zip(problem.nodes, known, strict=True)
    )
    latency_s, bandwidth_bytes_per_s = with_links(problem, estimates.links)
    return replace(
        problem,
        nodes=nodes,
        link_latency_s=latency_s,
        link_bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        prefill_s_per_token=problem.prefill_s_per_token * factors,
        decode_s_per_token=problem.decode_s_per_token * factors,
    )


def ahead(problem: Problem, estimates: Estimates) -> Problem:
    """The problem as it is expected over the horizon of a decision. It was posed under the same estimates.

    Of the rates of requests it has the cautious ones, so that a plan has room for the requests that may come. Nodes and
    links are expected to become worse, but not better: requests pay for how they are now, and once they are better, the
    next plan uses that.
    """
    backgrounds = {name: node.background_ahead for name, node in estimates.nodes.items()}
    nodes = tuple(
        node
        if (expected := backgrounds.get(node.name)) is None
        else replace(node, background_utilization=min(MAX_BACKGROUND, max(node.background_utilization, expected.mean)))
        for node in problem.nodes
    )
    classes = tuple(
        replace(each, rate_rps=estimates.rates_rps[each.name].cautious) if each.name in estimates.rates_rps else each
        for each in problem.classes
    )
    return replace(
        problem,
        nodes=nodes,
        classes=classes if any(each.rate_rps > 0 for each in classes) else problem.classes,
        link_bandwidth_bytes_per_s=bandwidth_ahead(problem, estimates.links),
    )


def speed_jumps(estimates: Estimates, now_s: float) -> dict[str, SpeedJump]:
    """The last jump of each node that jumped, for the next fit. The estimates are those at `now_s`."""
    return {
        name: SpeedJump(now_s - node.jumped_s_ago, node.factor)
        for name, node in estimates.nodes.items()
        if node.jumped_s_ago is not None
    }


class _SeenNode:
    """What was seen of one node."""

    def __init__(self) -> None:
        self.background_ahead = Reverting()
        self.speed = Level(_SPEED_NOISE, _SPEED_DRIFT, _SPEED_LEAST, _SPEED_MOMENTS, _SPEED_APART_S)
        self.background = Level(_BACKGROUND_NOISE, _BACKGROUND_DRIFT, _BACKGROUND_LEAST)
        self.passes: deque[tuple[SegmentTime, float]] = deque(maxlen=_PASSES_KEPT)  # since the last jump; with contexts
        self.computed_s = -math.inf  # when the last pass ended
        self.reference_s = math.nan  # the last report
        self.jumped_s: float | None = None  # when the last jump of the speed was detected

    def shares_batch(self, segment: SegmentTime, at_s: float) -> bool:
        """Whether the last pass was computed in the same batch, and has shown all that this one could."""
        last = self.passes[-1][0] if self.passes else None
        return last is not None and last.computed_s == segment.computed_s and at_s - self.computed_s < _SAME_BATCH_S


class ClusterEstimate:
    """The estimate of one cluster. Without a cost model it only collects.

    Times are those of one monotonic clock.
    """

    def __init__(self, features: Sequence[BlockFeatures], source: str) -> None:
        self.links = LinkEstimates()
        self._features = tuple(features)
        self._source = source
        # Between the nodes of the route of an epoch: of passes with the gateway's hops, and of those that followed.
        self._hops: tuple[int, tuple[Level, Level]] = (0, (_hops_level(), _hops_level()))
        self._expected: ExpectedTimes | None = None
        self._nodes: defaultdict[str, _SeenNode] = defaultdict(_SeenNode)
        self._now_s = -math.inf  # when anything was seen last

    def set_model(self, model: CostModel) -> None:
        """Use a new cost model. What the last passes show of each node is compared with it."""
        self._expected = ExpectedTimes(model, self._features)
        self.links.set_model(model)
        for name, node in self._nodes.items():
            if self._now_s - node.computed_s > _PASSES_S:
                node.passes.clear()
            bounds = [each for each in (self._log_factors(name, *each) for each in node.passes) if each is not None]
            exact = [least for least, most in bounds if least == most]
            logs = exact or [(least + most) / 2 for least, most in bounds]
            node.speed.restart(float(np.median(logs)) if logs else self._log_reference(name) or 0.0)

    def observe(self, done: PassTime) -> list[Change]:
        """Take the times of a pass; returns the jumps that it reveals."""
        changes, self._now_s = [], max(done.at_s, self._now_s)
        for segment in done.segments:
            node = self._nodes[segment.node]
            if node.shares_batch(segment, done.at_s):
                continue
            node.computed_s = done.at_s
            changes += self._observe_background(segment.node, segment.background_utilization, done.at_s)
            node.passes.append((segment, float(done.start)))
            halves = [self._log_factors(half.node, half, float(done.start)) for half in segment.halves()]
            if known := [bounds for bounds in halves if bounds is not None]:
                mean = node.speed.mean
                nearest = [min(max(mean, least), most) for least, most in known]
                if any(least < mean < most for least, most in known):
                    continue  # as it was, or anything else within these bounds
                # What delays the node for a moment delays one half: the other one says more.
                log_factor = min(nearest, key=lambda each: abs(each - mean))
                hiccup = _HICCUP_S / max(segment.node_s / len(halves), 1e-6)
                changes += self._observe_speed(segment.node, log_factor, done.at_s, hiccup)
        return changes

    def suspects(self, done: PassTime) -> list[tuple[str, str]]:
        """The links that a pass crossed, if the time between its nodes seems to have jumped: measure them."""
        if done.start == 0:  # a prompt is forwarded in parts, while others of it are computed
            return []
        if self._hops[0] < done.epoch:
            self._hops = (done.epoch, (_hops_level(), _hops_level()))
        if done.epoch < self._hops[0]:
            return []
        level = self._hops[1][done.followed]
        _, _, hops_s = done.spent_s()
        if not level.observe(hops_s, done.at_s) and not level.doubted:
            return []
        nodes = tuple(segment.node for segment in done.segments)
        # A pass that follows another one begins where that one ended.
        return route_hops(nodes[-1] if done.followed else self._source, nodes)

    def observe_report(self, node: str, reference_s: float, background: float, at_s: float) -> list[Change]:
        """Take a node's report: its time for the reference layer, and the share of it that others use."""
        known, self._now_s = self._nodes[node], max(at_s, self._now_s)
        known.reference_s = reference_s
        if at_s - known.computed_s < _FRESH_S:  # its passes say more, and sooner
            return []
        changes = self._observe_background(node, background, at_s)
        log_factor = self._log_reference(node)
        return changes if log_factor is None else [*changes, *self._observe_speed(node, log_factor, at_s, 0.0)]

    def doubts(self, node: str) -> bool:
        """Whether a node seems to have changed by its last report: it should report again at once."""
        known = self._nodes[node]
        return known.speed.doubted or known.background.doubted

    def estimates(self, at_s: float) -> Estimates:
        """The estimate of each node and link of which anything is known, at `at_s`."""
        nodes = {name: _estimate(node, at_s) for name, node in self._nodes.items()}
        return Estimates(nodes, self.links.estimates(at_s))

    def _log_factors(self, node: str, segment: SegmentTime, context_tokens: float) -> tuple[float, float] | None:
        """The logarithm of measured over expected time, the least and the most; None where neither is known."""
        if segment.prompt_half:  # the model has only batches that run as one through all blocks
            return None
        expected_s = self._expected.batch_s(node, segment, context_tokens) if self._expected else None
        if expected_s is None:
            return None
        least_s, most_s = expected_s
        least = log_ratio(segment.node_s, most_s)
        most = least if least_s == most_s else log_ratio(segment.node_s, least_s)
        return None if least is None or most is None else (least, most)

    def _log_reference(self, node: str) -> float | None:
        known_s = self._expected.reference_s(node) if self._expected else None
        return log_ratio(self._nodes[node].reference_s, known_s)

    def _observe_speed(self, node: str, log_factor: float, at_s: float, extra_noise: float) -> list[Change]:
        known = self._nodes[node]
        level = known.speed
        if not level.known:  # the model was fitted to such times; a first one may be late
            level.restart(0.0)
        before = level.mean
        if not level.observe(log_factor, at_s, extra_noise):
            return []
        while len(known.passes) > 1:  # the earlier ones are from before the jump
            known.passes.popleft()
        if known.computed_s < at_s:  # a report revealed the jump
            known.passes.clear()
        known.jumped_s, deviation = at_s, level.deviation(at_s)
        return [Change(at_s, node, "time", math.exp(before), math.exp(level.mean), deviation)]

    def _observe_background(self, node: str, share: float, at_s: float) -> list[Change]:
        if not 0 <= share <= 1:  # also NaN: no share of a node, whatever the node says
            return []
        known = self._nodes[node]
        level = known.background
        before = level.mean
        alarmed = level.observe(share, at_s)
        known.background_ahead.observe(level.mean, at_s)
        if not alarmed:
            return []
        return [Change(at_s, node, "background", before, level.mean, level.deviation(at_s))]


def _hops_level() -> Level:
    """Of the seconds between the nodes of a route: noise, drift in a second, and the least jump to look into."""
    return Level(0.004, 0.001, 0.01)


def _estimate(node: _SeenNode, at_s: float) -> NodeEstimate:
    speed, background = node.speed, node.background
    share = min(MAX_BACKGROUND, max(0.0, background.mean)) if background.known else None
    return NodeEstimate(
        factor=math.exp(speed.mean) if speed.known else 1.0,
        deviation=speed.deviation(at_s) if speed.known else 0.0,
        background_utilization=share,
        age_s=age_s(at_s, speed, background),
        background_ahead=None if share is None else node.background_ahead.forecast(share, at_s),
        jumped_s_ago=None if node.jumped_s is None else max(0.0, at_s - node.jumped_s),
    )
