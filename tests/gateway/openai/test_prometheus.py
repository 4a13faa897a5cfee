"""The metrics of passes are read from what the controller has summed up."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from resplit.gateway.openai.prometheus import PassMetrics
from resplit.pass_times import PassTime, SegmentTime, TimeByNode


def test_the_times_of_passes_are_shown_as_they_are_when_somebody_asks() -> None:
    registry, spent = CollectorRegistry(), TimeByNode()
    PassMetrics(registry, spent)
    for computed_s in (0.25, 0.5):
        segments = (SegmentTime("hub", 0, 1, 0.125, computed_s, 0.0, 1, 0),)
        spent.add(PassTime(1, 8, 1, 3.0, 1.0, segments))
    shown = generate_latest(registry).decode().splitlines()
    assert [line for line in shown if not line.startswith("#")] == [
        'resplit_pass_seconds_total{node="",part="hops"} 1.0',
        'resplit_pass_seconds_total{node="hub",part="waited"} 0.25',
        'resplit_pass_seconds_total{node="hub",part="computed"} 0.75',
    ]
