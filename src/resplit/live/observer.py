"""Reads what the live page shows from the controller, the monitor and the gateway. It changes nothing."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from resplit.control.planning import DEMAND_WINDOW_S
from resplit.decide import Decision
from resplit.errors import DataError
from resplit.estimate import Estimates, NodeEstimate, under_estimates
from resplit.gateway.openai.prometheus import RequestMetrics
from resplit.live.views import (
    FlowView,
    LinkView,
    ModelView,
    NodeView,
    RequestClassView,
    RequestView,
    Sections,
    ServiceView,
    SpeedView,
)
from resplit.pass_times import PassTime, TimeSpent
from resplit.session_records import SessionRecord
from resplit.status import ReportedState
from resplit.types import Problem

_ESTIMATES_EVERY_S = 1.0
_REQUESTS_KEPT = 400
_DECISIONS_KEPT = 40
_EPOCHS_SHOWN = 30


class Observer:
    """What there is to see of one cluster. Requests are kept for pages that are opened later, passes are summed."""

    def __init__(self, controller: Controller, monitor: Monitor, metrics: RequestMetrics) -> None:
        self._controller = controller
        self._monitor = monitor
        self._metrics = metrics
        self.requests: deque[RequestView] = deque(maxlen=_REQUESTS_KEPT)
        self._numbers = 0
        self._passes = 0
        self._spent = TimeSpent()
        self._by_node: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._estimated_s = -math.inf
        self._speeds: tuple[SpeedView, ...] = ()
        self._links: tuple[LinkView, ...] = ()

    def ended(self, record: SessionRecord) -> None:
        """Take the record of a request that ended."""
        self._numbers += 1
        self.requests.append(RequestView.of(record, self._numbers))

    def passed(self, done: PassTime) -> None:
        """Add the times of a pass."""
        self._passes += 1
        self._spent.add(done)
        for segment in done.segments:
            sums = self._by_node[segment.node]
            sums[0] += segment.waited_s
            sums[1] += segment.computed_s

    def sections(self) -> Sections:
        """Everything as it is now. Estimates are renewed once a second."""
        if time.monotonic() >= self._estimated_s + _ESTIMATES_EVERY_S:
            self._estimated_s = time.monotonic()
            self._speeds, self._links = self._estimates()
        return Sections(
            model=self._model(),
            nodes=tuple(self._node(name) for name in self._controller.view.addresses),
            speeds=self._speeds,
            links=self._links,
            epochs=tuple(self._controller.deployment.history[-_EPOCHS_SHOWN:]),
            service=self._service(),
            flow=self._flow(),
        )

    def decisions(self, since: int | None) -> list[Decision]:
        """The decisions numbered above `since`; without it, the last ones."""
        if since is None:
            since = max(0, self._controller.log.last_decision() - _DECISIONS_KEPT)
        return self._controller.decisions(since)

    def _model(self) -> ModelView:
        view = self._controller.view
        cluster, features = view.cluster, view.rules.features
        return ModelView(
            cluster=cluster.name,
            model=view.model.name,
            source=cluster.source,
            blocks=tuple(block.name for block in features),
            private=tuple(index for index, block in enumerate(features) if block.private),
            classes=tuple(RequestClassView(each.name, each.slo) for each in cluster.classes),
            sessions=cluster.limits.sessions,
            kv_tokens=cluster.kv_tokens,
        )

    def _node(self, name: str) -> NodeView:
        view = self._controller.view
        state = self._monitor.states.get(name, ReportedState(name, pid=None))
        return NodeView(
            name=name,
            answers=name in view.gateway.connected_nodes(),
            fault=view.gateway.faults().get(name),
            trusted=name in view.cluster.trusted,
            drained=name in view.rules.drained,
            emulated=state.emulated,
            memory_bytes=state.memory_bytes,
            held_bytes=state.held_bytes,
            blocks=tuple(state.blocks),
            copies=tuple(state.copies),
            sessions=state.sessions,
            refusals=state.refusals,
            heard_s=self._monitor.heard_s.get(name),
        )

    def _service(self) -> ServiceView:
        controller, status = self._controller, self._controller.view.gateway.status()
        newest = controller.deployment.history[-1] if controller.deployment.history else None
        responses: defaultdict[str, float] = defaultdict(float)
        for labels, count in _counts(self._metrics.requests.collect()):
            responses[labels["status"]] += count
        return ServiceView(
            ready=status.ready,
            sessions=status.sessions,
            waiting=status.waiting,
            cached_tokens=status.cached_tokens,
            tokens=sum(count for _, count in _counts(self._metrics.new_tokens.collect())),
            responses=dict(responses),
            note=newest.note if newest else "",
            warning=controller.emulation_warning(),
        )

    def _flow(self) -> FlowView:
        nodes = {name: (waited_s, computed_s) for name, (waited_s, computed_s) in self._by_node.items()}
        return FlowView(self._passes, self._spent.waited_s, self._spent.computed_s, self._spent.hops_s, nodes)

    def _estimates(self) -> tuple[tuple[SpeedView, ...], tuple[LinkView, ...]]:
        live, now_s = self._controller.live, time.time()
        if live is None:
            return (), ()
        try:
            posed = self._controller.planner.present_problem(live.placement, DEMAND_WINDOW_S)
        except DataError:  # nothing was measured yet
            return (), ()
        estimates = self._controller.fast_loop.estimates()
        problem = under_estimates(posed, estimates)
        return _speeds(problem, estimates, now_s), _links(problem, estimates, now_s)


def _speeds(problem: Problem, estimates: Estimates, now_s: float) -> tuple[SpeedView, ...]:
    layers = [index for index, block in enumerate(problem.blocks) if block.kv_bytes_per_token > 0]
    found = []
    for index, node in enumerate(problem.nodes):
        times_s = problem.decode_s_per_token[layers, index]
        known = times_s[~np.isnan(times_s)]
        estimate = estimates.nodes.get(node.name, NodeEstimate())
        found.append(
            SpeedView(
                node=node.name,
                layer_s=float(known.mean()) if len(known) else None,
                factor=estimate.factor,
                deviation=estimate.deviation,
                background=estimate.background_utilization,
                seen_s=_moment(now_s, estimate.age_s),
            )
        )
    return tuple(found)


def _links(problem: Problem, estimates: Estimates, now_s: float) -> tuple[LinkView, ...]:
    ages_s = {(link.node, link.peer): link.age_s for link in estimates.links}
    names = [node.name for node in problem.nodes]
    return tuple(
        LinkView(
            node=one,
            peer=other,
            latency_s=float(problem.link_latency_s[i, j]),
            bandwidth_bytes_per_s=float(problem.link_bandwidth_bytes_per_s[i, j]),
            seen_s=_moment(now_s, ages_s.get((one, other))),
        )
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i != j and not math.isnan(problem.link_latency_s[i, j])
    )


def _moment(now_s: float, age_s: float | None) -> float | None:
    """The moment `age_s` seconds ago, to a second: it does not change while nothing new is seen."""
    return None if age_s is None else float(round(now_s - age_s))


def _counts(metrics: Iterable[Any]) -> list[tuple[dict[str, str], float]]:
    """The samples of a counter, with their labels."""
    return [
        (sample.labels, sample.value)
        for metric in metrics
        for sample in metric.samples
        if sample.name.endswith("_total")
    ]
