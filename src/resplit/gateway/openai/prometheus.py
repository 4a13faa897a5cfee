"""Prometheus metrics of the gateway, and the stopwatch that measures one request for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from resplit.errors import CLIENT_GONE_STATUS
from resplit.pass_times import TimeByNode

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_UNKNOWN = "unknown"

Stage = Literal["reading", "waiting", "decoding"]


class RequestMetrics:
    """All metrics, in one registry. Other parts may add metrics of their own to it; /metrics shows them too."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_class = ("request_class",)
        self.requests = Counter(
            "resplit_requests_total",
            "Generation requests that ended, by class and HTTP status; 499: the client left; a stream that failed "
            "counts with the status of its error",
            ("request_class", "status"),
            registry=self.registry,
        )
        self.prompt_tokens = self._counter("resplit_prompt_tokens_total", "Prompt tokens of requests that got a token")
        self.new_tokens = self._counter("resplit_new_tokens_total", "Tokens generated")
        self.latency_s = self._histogram(
            "resplit_request_latency_seconds", "From arrival to the last token, of completed requests"
        )
        self.first_token_s = self._histogram("resplit_time_to_first_token_seconds", "From arrival to the first token")
        self.token_s = self._histogram("resplit_time_per_token_seconds", "From one token to the next")
        self.queue_depth = Gauge(
            "resplit_queue_depth",
            "Requests without a token yet: queued or in prefill",
            by_class,
            registry=self.registry,
        )
        self.sessions_live = Gauge(
            "resplit_sessions_live", "Requests whose tokens are being generated", by_class, registry=self.registry
        )
        self.tasks = Gauge("resplit_tasks", "Tasks of the gateway's event loop", registry=self.registry)

    def expose(self) -> bytes:
        """All metrics in Prometheus' text format. Must be called on the event loop."""
        self.tasks.set(len(asyncio.all_tasks()))
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ("request_class",), registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("request_class",), buckets=_SECONDS, registry=self.registry)


class PassMetrics(Collector):
    """Where the time of passes goes: in queues of nodes, in their batches, between nodes.

    `spent` is read when the metrics are, so that a pass updates none.
    """

    def __init__(self, registry: CollectorRegistry, spent: TimeByNode) -> None:
        self._spent = spent
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The times of all passes so far."""
        family = CounterMetricFamily(
            "resplit_pass_seconds_total",
            "Time of passes by part (waited, computed, hops) and node; hops are between nodes, and have none",
            labels=("part", "node"),
        )
        family.add_metric(("hops", ""), self._spent.hops_s)
        for name, node in self._spent.nodes.items():
            family.add_metric(("waited", name), node.waited_s)
            family.add_metric(("computed", name), node.computed_s)
        yield family


class Stopwatch:
    """Measures one request from its arrival to its end. `end` must be called exactly once."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._class, self._prompt_tokens = _UNKNOWN, 0
        self._stage: Stage = "reading"
        self._last_token_s = 0.0
        self._token_s: Histogram | None = None  # of the request's class, once it has a token
        self._new_tokens: Counter | None = None
        self.arrival_s = time.monotonic()
        self.status = CLIENT_GONE_STATUS

    def admit(self, request_class: str, prompt_tokens: int) -> None:
        """Record that the request is valid and waits for its first token. `prompt_tokens` are those of all prompts."""
        self._class, self._prompt_tokens = request_class, prompt_tokens
        self._enter("waiting")

    def token(self) -> None:
        """Record a token. The first one also counts the prompt's."""
        now_s = time.monotonic()
        if self._token_s is None or self._new_tokens is None:
            self._token_s = self._metrics.token_s.labels(self._class)
            self._new_tokens = self._metrics.new_tokens.labels(self._class)
            self._enter("decoding")
            self._metrics.first_token_s.labels(self._class).observe(now_s - self.arrival_s)
            self._metrics.prompt_tokens.labels(self._class).inc(self._prompt_tokens)
        else:
            self._token_s.observe(now_s - self._last_token_s)
        self._new_tokens.inc()
        self._last_token_s = now_s

    def leave(self) -> None:
        """Record that the client left before its answer was complete."""
        self.status = CLIENT_GONE_STATUS

    def end(self) -> None:
        """Record that the request ended with `status`."""
        if self._stage == "decoding" and self.status == 200:
            self._metrics.latency_s.labels(self._class).observe(self._last_token_s - self.arrival_s)
        self._enter("reading")
        self._metrics.requests.labels(self._class, str(self.status)).inc()

    def _enter(self, stage: Stage) -> None:
        gauges = {"waiting": self._metrics.queue_depth, "decoding": self._metrics.sessions_live}
        if left := gauges.get(self._stage):
            left.labels(self._class).dec()
        if entered := gauges.get(stage):
            entered.labels(self._class).inc()
        self._stage = stage
