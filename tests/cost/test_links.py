"""The link model."""

from __future__ import annotations

import pytest

from resplit.cost.links import fit_links
from resplit.telemetry import LINK_COLUMNS, frame
from tests.support.telemetry import MACHINES, link_rows

TWO = {name: MACHINES[name] for name in ("home-a", "cloud")}


def test_latency_and_bandwidth_are_fitted_for_each_direction() -> None:
    there = [row for row in link_rows(TWO, 0.02, 1e6) if row["node"] == "home-a"]
    back = [row for row in link_rows(TWO, 0.005, 1e7) if row["node"] == "cloud"]
    links = {link.node: link for link in fit_links(frame(there + back, LINK_COLUMNS))}
    assert links["home-a"].latency_s == pytest.approx(0.02, rel=0.05)
    assert links["home-a"].bandwidth_bytes_per_s == pytest.approx(1e6, rel=0.05)
    assert links["cloud"].latency_s == pytest.approx(0.005, rel=0.05)
    assert links["cloud"].bandwidth_bytes_per_s == pytest.approx(1e7, rel=0.05)
    assert links["cloud"].seconds(1e6) == pytest.approx(0.105, rel=0.05)


def test_messages_that_hung_do_not_change_the_link() -> None:
    rows = link_rows(TWO)
    for row in rows[::7]:
        row["seconds"] = float(str(row["seconds"])) + 0.5
    link = fit_links(frame(rows, LINK_COLUMNS))[0]
    assert link.latency_s == pytest.approx(0.003, rel=0.2)
    assert link.bandwidth_bytes_per_s == pytest.approx(2e7, rel=0.2)


def test_activations_weigh_less_than_probes() -> None:
    rows = link_rows(TWO, noise=0.0)
    waited = [row | {"source": "passive", "seconds": 1.5 * float(str(row["seconds"]))} for row in rows]
    probes = [row | {"source": "active"} for row in rows]
    half = len(waited) // 2
    link = fit_links(frame(probes + waited + waited[:half], LINK_COLUMNS))[0]  # 3 activations to 2 probes
    assert link.latency_s == pytest.approx(0.003, rel=0.1)


def test_with_one_payload_size_the_bandwidth_is_the_previous_one_or_that_of_the_opposite_direction() -> None:
    small = [row for row in link_rows(TWO) if row["payload_bytes"] == 256.0 and row["node"] == "home-a"]
    back = [row for row in link_rows(TWO, bandwidth=5e6) if row["node"] == "cloud"]
    from_back = {link.node: link for link in fit_links(frame(small + back, LINK_COLUMNS))}
    assert from_back["home-a"].bandwidth_bytes_per_s == from_back["cloud"].bandwidth_bytes_per_s
    assert from_back["home-a"].latency_s == pytest.approx(0.003, rel=0.1)
    before = fit_links(frame(link_rows(TWO), LINK_COLUMNS))
    from_before = {link.node: link for link in fit_links(frame(small + back, LINK_COLUMNS), before)}
    assert from_before["home-a"].bandwidth_bytes_per_s == pytest.approx(2e7, rel=0.05)


def test_with_one_payload_size_and_no_known_bandwidth_all_time_is_latency() -> None:
    small = [row for row in link_rows(TWO, noise=0.0) if row["payload_bytes"] == 65536.0]
    link = fit_links(frame(small, LINK_COLUMNS))[0]
    assert link.seconds(65536.0) == pytest.approx(0.003 + 65536 / 2e7)
    assert 0 < link.bandwidth_bytes_per_s < float("inf")


def test_a_few_messages_show_that_a_link_degraded() -> None:
    before = fit_links(frame(link_rows(TWO), LINK_COLUMNS))
    few = [row for row in link_rows(TWO, latency_s=0.04, bandwidth=1e6) if row["payload_bytes"] in (256.0, 65536.0)]
    link = fit_links(frame(few[:8], LINK_COLUMNS), before)[0]
    assert link.latency_s == pytest.approx(0.04, rel=0.1)
    assert link.bandwidth_bytes_per_s == pytest.approx(1e6, rel=0.2)


def test_a_link_without_messages_keeps_its_model() -> None:
    before = fit_links(frame(link_rows(TWO), LINK_COLUMNS))
    assert fit_links(frame([], LINK_COLUMNS), before) == before
