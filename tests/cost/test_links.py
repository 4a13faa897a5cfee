"""The link model."""

from __future__ import annotations

import pytest

from resplit.cost.links import MIN_S_PER_BYTE, LinkModel, fit_links
from resplit.telemetry.tables import LINK_COLUMNS, frame
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


def _messages(node: str, peer: str, *sizes_and_times: tuple[float, float]) -> list[dict[str, object]]:
    return [
        {
            "time_s": float(index),
            "node": node,
            "peer": peer,
            "payload_bytes": payload_bytes,
            "seconds": seconds,
            "source": "active",
            "emulated": True,
        }
        for index, (payload_bytes, seconds) in enumerate(sizes_and_times)
    ]


AB, BA = LinkModel("a", "b", 0.5, 0.01, 0.1, 0.002, 7), LinkModel("b", "a", 0.25, 0.02, 0.2, 0.003, 8)
SAME_SIZE = ((100.0, 3.0), (100.0, 4.0), (100.0, 6.0), (100.0, 4.5))


def _fitted(node: str, peer: str, *previous: LinkModel) -> LinkModel:
    links = fit_links(frame(_messages(node, peer, *SAME_SIZE), LINK_COLUMNS), previous)
    return next(link for link in links if (link.node, link.peer) == (node, peer))


@pytest.mark.parametrize(
    ("previous", "s_per_byte", "s_per_byte_error"),
    [
        ((AB, BA), 0.01, 0.002),
        ((BA,), 0.02, 0.003),
        ((LinkModel("c", "d", 0.0, 0.03, 0.0, 0.5, 1), LinkModel("d", "c", 0.0, 0.01, 0.0, 0.5, 1)), 0.02, 0.02),
        ((), 0.0, 0.0),
    ],
    ids=["previous", "opposite direction", "median of the cluster", "none"],
)
def test_with_one_payload_size_the_latency_is_the_median_of_the_rest(
    previous: tuple[LinkModel, ...], s_per_byte: float, s_per_byte_error: float
) -> None:
    link = _fitted("a", "b", *previous)
    assert (link.node, link.peer, link.rows) == ("a", "b", 4)
    assert link.s_per_byte == pytest.approx(s_per_byte)
    assert link.s_per_byte_error == pytest.approx(s_per_byte_error)
    assert link.latency_s == pytest.approx(4.25 - 100 * s_per_byte)
    assert link.latency_error_s == pytest.approx(1.4826 * 0.75 / 2)  # median absolute deviation over the root of rows


def test_a_latency_is_never_negative() -> None:
    assert _fitted("a", "b", LinkModel("a", "b", 0.5, 1.0, 0.1, 0.2, 7)).latency_s == 0.0


@pytest.mark.parametrize(("largest", "fitted"), [(199.0, False), (200.0, True)])
def test_the_bandwidth_is_fitted_if_the_largest_payload_is_twice_the_smallest(largest: float, fitted: bool) -> None:
    rows = _messages("a", "b", (100.0, 3.0), (largest, 3.0 + 0.02 * (largest - 100.0)))
    (link,) = fit_links(frame(rows, LINK_COLUMNS))
    assert (link.s_per_byte > 0) == fitted
    assert link.rows == 2


def test_the_previous_model_is_the_guess_where_the_messages_leave_bandwidth_open() -> None:
    zero = _messages("a", "b", *[(100.0, 2.0)] * 3, (200.0, 3.0))
    (without,), (guided,) = (
        fit_links(frame(zero, LINK_COLUMNS), previous) for previous in ((), (LinkModel("a", "b", 0.0, 0.02, 0, 0, 1),))
    )
    assert without.s_per_byte == pytest.approx(0.01, rel=1e-3)
    assert 1.001 * without.s_per_byte < guided.s_per_byte < 0.02


def test_a_link_takes_its_latency_and_its_payload_over_a_finite_bandwidth() -> None:
    assert AB.seconds(100.0) == pytest.approx(1.5)
    assert AB.bandwidth_bytes_per_s == pytest.approx(100.0)
    assert LinkModel("a", "b", 0.5, 0.0, 0.1, 0.0, 7).bandwidth_bytes_per_s == 1 / MIN_S_PER_BYTE
