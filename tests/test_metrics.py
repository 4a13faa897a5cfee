"""The metrics of a run follow their definitions."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.metrics import (
    RunMetrics,
    busy,
    downtime,
    epoch_latency,
    met_objective,
    series,
    summarise,
    utilization_series,
)
from resplit.records import TABLES, RunRecord
from tests.support.properties import examples
from tests.support.run_tables import NAN, epoch, record, request
from tests.support.runs import synthetic_run


def incidents(run: RunRecord) -> list[tuple[float, float]]:
    return [(row.from_s, row.until_s) for row in downtime(run).itertuples()]


def test_latencies_count_from_arrival_and_cover_completed_requests_only() -> None:
    run = record(
        [
            request(0.0, 2.0, first_token_s=1.0, new_tokens=5),
            request(10.0, 14.0, first_token_s=10.5, new_tokens=1),
            request(20.0, 20.1, status=503),
            request(30.0),
        ]
    )
    metrics = summarise(run)
    assert (metrics.offered, metrics.completed) == (4, 2)
    assert metrics.latency_mean_s == pytest.approx(3.0)
    assert metrics.first_token_mean_s == pytest.approx(0.75)
    assert metrics.time_per_token_s == pytest.approx(0.25)


def test_refused_failed_late_and_unfinished_requests_do_not_meet_their_objective() -> None:
    run = record(
        [
            request(0.0, 1.0, slo_s=1.0),
            request(0.0, 1.1, slo_s=1.0),
            request(0.0, 50.0),
            request(0.0, 0.1, status=429, slo_s=1.0),
            request(0.0, 0.1, status=503),
            request(0.0, status=0),
            request(0.0, slo_s=1.0),
        ]
    )
    assert met_objective(run.requests).tolist() == [True, False, True, False, False, False, False]


def test_a_run_without_requests_has_no_latency_and_no_downtime() -> None:
    metrics = summarise(record([]))
    assert math.isnan(metrics.latency_mean_s)
    assert math.isnan(metrics.qos_met)
    assert (metrics.downtime_incidents, metrics.downtime_incidents_per_hour) == (0, 0.0)


def test_an_idle_minute_is_not_downtime() -> None:
    assert incidents(record([request(0.0, 0.9), request(59.0, 59.9)], tokens=[0.9, 59.9])) == []


def test_silence_while_a_request_waits_is_one_incident() -> None:
    assert incidents(record([request(0.0, 5.0)], tokens=[0.5, 1.0, 4.0, 4.9])) == [(1.0, 4.0)]


def test_an_incident_begins_with_the_first_request_that_waits() -> None:
    run = record([request(0.0, 0.9), request(10.0, 14.0), request(11.0, 14.5)], tokens=[0.9, 14.0, 14.5])
    assert incidents(run) == [(10.0, 14.0)]


def test_a_token_of_another_request_ends_the_silence() -> None:
    run = record([request(0.0, 3.0), request(0.0, 3.0)], tokens=[0.9, 1.8, 2.7, 3.0])
    assert incidents(run) == []


def test_two_silences_with_a_token_between_are_two_incidents() -> None:
    run = record([request(0.0, 10.0)], tokens=[0.0, 2.0, 10.0])
    assert incidents(run) == [(0.0, 2.0), (2.0, 10.0)]
    assert summarise(run).downtime_incidents_per_hour == pytest.approx(2 * 60)
    assert summarise(run).downtime_s == pytest.approx(10.0)


def test_exactly_a_second_counts_and_less_does_not() -> None:
    assert incidents(record([request(0.0, 1.0)], tokens=[1.0])) == [(0.0, 1.0)]
    assert incidents(record([request(0.0, 0.999)], tokens=[0.999])) == []


def test_a_system_that_answers_503_at_once_is_down_until_its_last_refusal() -> None:
    failures = [request(at, at + 0.01, status=503) for at in (10.0, 13.0, 16.0)]
    run = record([request(0.0, 0.5), *failures, request(20.0, 20.5)], tokens=[0.5, 20.5])
    assert incidents(run) == [(10.0, 16.01)]


def test_failures_with_tokens_between_them_are_not_an_incident() -> None:
    failures = [request(at, at + 0.01, status=503) for at in (10.0, 13.0)]
    assert incidents(record([*failures, request(11.0, 11.5)], tokens=[11.2, 11.5])) == []


def test_shed_and_malformed_requests_create_no_demand() -> None:
    assert incidents(record([request(0.0, 5.0, status=429), request(1.0, 9.0, status=400)])) == []


def test_a_request_that_never_ends_waits_until_the_end_of_the_run() -> None:
    assert incidents(record([request(50.0)], tokens=[52.0])) == [(50.0, 52.0), (52.0, 60.0)]


def test_a_request_with_a_failed_connection_does_not_wait() -> None:
    assert incidents(record([request(50.0, status=0)])) == []


def test_utilisation_weighs_nodes_equally_and_ends_with_the_run() -> None:
    rows = [("a", 1.0, 0.2), ("a", 2.0, 0.4), ("a", 3.0, 0.6), ("b", 1.0, 0.8), ("b", 70.0, 0.0)]
    use = [{"time_s": t, "node": n, "utilization": u, "own_utilization": u} for n, t, u in rows]
    assert summarise(record([], use=use)).utilization == pytest.approx(0.6)


def test_reconfigurations_are_the_epochs_after_the_first() -> None:
    moves = [
        epoch(1, 0.0, "initial", moved_bytes=5e6),
        epoch(2, 9.0, "re-split", moved_bytes=3e6, pause_s=0.02),
        epoch(3, 19.0, "redistribute", moved_bytes=1e6, pause_s=0.04),
    ]
    metrics = summarise(record([], epochs=moves))
    assert (metrics.reconfigurations, metrics.moved_bytes) == (2, 4e6)
    assert (metrics.pause_mean_s, metrics.pause_max_s) == (pytest.approx(0.03), 0.04)


def test_privacy_counts_requests_with_a_private_block_on_an_untrusted_node() -> None:
    metrics = summarise(record([request(0.0, 1.0), request(0.0, 1.0, private_ok=False)]))
    assert (metrics.privacy_share, metrics.privacy_violations) == (0.5, 1)


def test_an_epoch_is_measured_by_the_requests_that_it_alone_served() -> None:
    requests = [
        request(1.0, 3.0),
        request(9.0, 19.0, epochs=2),
        request(11.0, 15.0),
        request(12.0, 12.1, status=503),
    ]
    epochs = epoch_latency(record(requests, epochs=[epoch(2, 10.0, "re-split"), epoch(1, 0.0, "initial")]))
    assert epochs.measured_latency_s.tolist() == [2.0, 4.0]
    assert epochs.requests.tolist() == [1, 1]
    assert epochs.until_s.tolist() == [10.0, 60.0]


def test_an_epoch_that_served_no_request_has_no_measured_latency() -> None:
    epochs = epoch_latency(record([request(11.0, 12.0)], epochs=[epoch(1, 0.0, "initial"), epoch(2, 10.0, "re-split")]))
    assert math.isnan(epochs.measured_latency_s[0])
    assert epochs.measured_latency_s[1] == 1.0


def test_the_series_look_back_over_their_window() -> None:
    run = record([request(0.5, 1.5), request(1.5, 4.5), request(1.6, 1.7, status=503)], duration_s=4.0)
    over_time = series(run, step_s=1.0, window_s=1.0)
    assert over_time.time_s.tolist() == [1.0, 2.0, 3.0, 4.0]
    np.testing.assert_allclose(over_time.latency_s, [1.0, 3.0, NAN, NAN])
    np.testing.assert_allclose(over_time.qos_met, [1.0, 0.5, NAN, NAN])
    assert over_time.utilization.isna().all()


def test_the_mean_utilisation_leaves_out_a_lost_node() -> None:
    use = [
        {"time_s": t, "node": n, "utilization": u, "own_utilization": u}
        for n, t, u in [("a", 1.0, 0.2), ("b", 1.0, 0.4), ("a", 2.0, 0.2)]
    ]
    run = record([], use=use, duration_s=2.0)
    np.testing.assert_allclose(series(run, window_s=1.0).utilization, [0.3, 0.2])
    np.testing.assert_allclose(utilization_series(run, window_s=1.0).b, [0.4, NAN])


RUN = synthetic_run("resplit", duration_s=40.0)


@examples(25)
@given(index=st.integers(0, len(RUN.requests) - 1), delay_s=st.floats(0, 1e3))
def test_qos_never_rises_when_a_request_ends_later(index: int, delay_s: float) -> None:
    later = RUN.requests.copy()
    later.loc[index, "end_s"] += delay_s
    assert met_objective(later).mean() <= met_objective(RUN.requests).mean()


@examples(10)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_rows_changes_nothing(seed: int) -> None:
    shuffled = {name: getattr(RUN, name).sample(frac=1, random_state=seed) for name in TABLES}
    before, after = summarise(RUN), summarise(replace(RUN, **shuffled))
    for name in (field.name for field in fields(RunMetrics)):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-9, nan_ok=True)
    pd.testing.assert_frame_equal(series(replace(RUN, **shuffled)), series(RUN))


@examples(50)
@given(
    tokens=st.lists(st.floats(0, 60), max_size=20),
    spans=st.lists(st.tuples(st.floats(0, 50), st.floats(0, 10)), max_size=8),
)
def test_incidents_are_disjoint_long_enough_and_free_of_tokens(
    tokens: list[float], spans: list[tuple[float, float]]
) -> None:
    found = incidents(record([request(start, start + length) for start, length in spans], tokens=tokens))
    for from_s, until_s in found:
        assert until_s - from_s >= 1.0
        assert not any(from_s < token < until_s for token in tokens)
        assert all(
            any(start <= moment <= start + length for start, length in spans)
            for moment in np.linspace(from_s, until_s, 7)
        )
    assert all(one[1] <= other[0] for one, other in pairwise(found))


def test_a_busy_node_computes_all_the_time_that_others_leave_it() -> None:
    def sample(time_s: float, node: str, utilization: float, own: float) -> dict[str, object]:
        return {"time_s": time_s, "node": node, "utilization": utilization, "own_utilization": own}

    use = [
        sample(1.0, "a", 0.9, 0.4),
        sample(1.0, "b", 0.5, 0.5),
        sample(2.0, "a", 1.0, 0.5),
        sample(2.0, "b", 0.0, 0.0),
    ]
    epochs = [epoch(1, 0.0, "initial", placement="a,b"), epoch(2, 1.5, "re-split", placement="a,a")]
    share, tokens_per_busy_s = busy(record([], [0.5] * 10, duration_s=2.0, use=use, epochs=epochs))
    assert share == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    assert tokens_per_busy_s == pytest.approx(10 / 2.3)
