"""The latency that is predicted for streams of which each sends one request after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.planner.closed_loop import with_streams
from resplit.planner.evaluate import evaluate
from resplit.types import Problem
from tests.support.decisions import FAST, SLOW, halves, problem
from tests.support.properties import examples

PLACEMENT = halves(FAST, SLOW)


def idle(load_share: float = 1.0) -> Problem:
    cluster = problem(PLACEMENT)
    nodes = tuple(replace(node, background_utilization=0.0, load_share=load_share) for node in cluster.nodes)
    return replace(cluster, nodes=nodes)


def test_a_single_stream_waits_for_nobody() -> None:
    evaluation = evaluate(with_streams(idle(), PLACEMENT, 1), PLACEMENT)
    assert evaluation.queueing_s[0] == pytest.approx(0, abs=1e-6)
    assert evaluation.terms.latency_s == pytest.approx(evaluation.compute_s[0] + evaluation.network_s[0])


@examples(20)
@given(streams=st.integers(2, 40), load_share=st.floats(0.05, 1.0))
def test_a_request_meets_the_other_streams_at_the_rate_that_they_cause(streams: int, load_share: float) -> None:
    posed = with_streams(idle(load_share), PLACEMENT, streams)
    others = posed.classes[0].rate_rps * evaluate(posed, PLACEMENT).terms.latency_s
    assert others == pytest.approx(streams - 1, rel=1e-6)


def test_many_streams_reach_the_rate_of_the_slowest_node_and_no_more() -> None:
    cluster = idle()
    busiest = evaluate(cluster, PLACEMENT).utilization.max() / cluster.classes[0].rate_rps  # seconds of a request
    rates = [with_streams(cluster, PLACEMENT, streams).classes[0].rate_rps for streams in (4, 40, 400)]
    assert rates == sorted(rates)
    assert 0.98 / busiest < rates[-1] < 1 / busiest
