"""The estimates of links, from probes of two sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.cost import CostModel, LinkModel, PredictionError
from resplit.estimate import ClusterEstimate, Estimates, LinkEstimates, both_ways, under_estimates
from resplit.estimate.links import LinkEstimate, route_hops
from resplit.pass_times import PassTime, SegmentTime
from tests.support.problems import tiny_problem

LATENCY_S, S_PER_BYTE = 0.02, 1e-7
SMALL, LARGE = 64, 32 * 1024
NO_ERROR = PredictionError(None, None, 0)


def model(latency_s: float = LATENCY_S) -> CostModel:
    return CostModel(0.0, {}, (), (LinkModel("a", "b", latency_s, S_PER_BYTE, 0.0, 0.0, 9),), NO_ERROR, NO_ERROR)


def probe(links: LinkEstimates, latency_s: float, s_per_byte: float, rounds: int, at_s: float = 0.0) -> list[str]:
    """Probe the link from a to b; returns what was detected."""
    changes = []
    for index in range(rounds):
        for size in (SMALL, LARGE):
            seconds = latency_s + size * s_per_byte
            changes += links.observe("a", "b", size, seconds, at_s + index)
    return [str(change) for change in changes]


@pytest.fixture
def links() -> LinkEstimates:
    known = LinkEstimates()
    known.set_model(model())
    assert probe(known, LATENCY_S, S_PER_BYTE, 10) == []
    return known


def test_a_longer_latency_is_noticed_at_the_second_probe_and_is_not_taken_for_a_slower_transfer(
    links: LinkEstimates,
) -> None:
    assert probe(links, 6 * LATENCY_S, S_PER_BYTE, 3, 20.0) == ["the latency between a and b became 6 times slower"]
    (link,) = links.estimates(at_s=0.0)
    assert link.latency_factor == pytest.approx(6.0, rel=0.05)
    assert link.s_per_byte_factor == pytest.approx(1.0, rel=0.05)


@pytest.fixture
def both_known(links: LinkEstimates) -> LinkEstimates:
    """Both directions between a and b are known."""
    there = model().links[0]
    links.set_model(replace(model(), links=(there, replace(there, node="b", peer="a"))))
    for size in (SMALL, LARGE):
        links.observe("b", "a", size, LATENCY_S + size * S_PER_BYTE, 19.0)
    return links


def test_both_ends_measure_one_latency_so_that_three_messages_of_either_reveal_a_change(
    both_known: LinkEstimates,
) -> None:
    late = [(20.0, "a", "b"), (20.1, "b", "a"), (20.2, "a", "b")]
    changes = [both_known.observe(*ends, SMALL, 6 * LATENCY_S, at_s) for at_s, *ends in late]
    assert [str(change) for found in changes for change in found] == [
        "the latency between a and b became 6 times slower"
    ]
    assert [link.latency_factor for link in both_known.estimates(20.2)] == pytest.approx([6.0, 6.0], rel=0.05)
    assert both_known.doubted() == []


def test_messages_that_are_late_at_one_end_only_are_no_slower_link(both_known: LinkEstimates) -> None:
    """A host that is held up gets all answers late, and those of the other end are as fast as usual."""
    for step in range(20):
        at_s = 20.0 + step / 10
        assert both_known.observe("a", "b", SMALL, 6 * LATENCY_S, at_s) == []
        assert both_known.observe("b", "a", SMALL, LATENCY_S, at_s + 0.05) == []
        assert both_known.doubted() == []


def test_a_message_from_before_the_change_that_is_reported_later_does_not_hide_it(both_known: LinkEstimates) -> None:
    assert both_known.observe("a", "b", SMALL, 6 * LATENCY_S, 20.0) == []
    assert both_known.observe("b", "a", SMALL, LATENCY_S, 19.9) == []
    assert both_known.observe("a", "b", SMALL, 6 * LATENCY_S, 20.1) == []
    assert len(both_known.observe("a", "b", SMALL, 6 * LATENCY_S, 20.2)) == 1


def test_the_way_back_counts_as_narrower_until_it_is_measured(both_known: LinkEstimates) -> None:
    probe(both_known, LATENCY_S, 6 * S_PER_BYTE, 4, 20.0)
    factors = [link.s_per_byte_factor for link in both_known.estimates(at_s=24.0)]
    assert factors == pytest.approx([6.0, 6.0], rel=0.05)
    for size in (SMALL, LARGE):
        both_known.observe("b", "a", size, LATENCY_S + size * S_PER_BYTE, 24.1)
    factors = [link.s_per_byte_factor for link in both_known.estimates(at_s=24.1)]
    assert factors == pytest.approx([6.0, 1.0], rel=0.05)


def test_a_narrower_link_is_noticed(links: LinkEstimates) -> None:
    assert probe(links, LATENCY_S, 8 * S_PER_BYTE, 4, 20.0) == ["the transfer from a to b became 8 times slower"]


def test_links_are_looked_into_both_ways_each_once() -> None:
    assert both_ways([("a", "b"), ("b", "c"), ("b", "a")]) == [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]


def test_messages_that_are_late_for_a_moment_are_no_slower_link_and_a_usual_one_ends_the_doubt(
    links: LinkEstimates,
) -> None:
    late = [links.observe("a", "b", SMALL, 20 * LATENCY_S, 20.0 + 0.03 * index) for index in range(4)]
    assert late == [[]] * 4
    assert links.doubted() == [("a", "b")]
    assert links.observe("a", "b", SMALL, LATENCY_S, 20.2) == []
    assert links.doubted() == []
    assert [links.observe("a", "b", SMALL, 20 * LATENCY_S, at_s) for at_s in (22.0, 22.1)] == [[], []]


def test_a_late_message_before_a_new_model_is_not_taken_for_the_link(links: LinkEstimates) -> None:
    assert links.observe("a", "b", SMALL, 20 * LATENCY_S, 20.0) == []
    links.set_model(model(2 * LATENCY_S))
    assert links.estimates(at_s=20.0)[0].latency_factor == pytest.approx(0.5, rel=0.05)
    assert probe(links, LATENCY_S, S_PER_BYTE, 5, 21.0) == []


def test_a_jump_that_hardly_delays_a_message_is_followed_and_raises_no_alarm() -> None:
    links = LinkEstimates()
    links.set_model(model(0.001))
    assert probe(links, 0.001, S_PER_BYTE, 10) == []
    assert probe(links, 0.004, S_PER_BYTE, 10, 20.0) == []
    assert links.estimates(at_s=20.0)[0].latency_factor > 3


def test_a_new_model_that_knows_of_the_change_leaves_nothing_to_correct(links: LinkEstimates) -> None:
    probe(links, 6 * LATENCY_S, S_PER_BYTE, 3, 20.0)
    links.set_model(model(6 * LATENCY_S))
    assert links.estimates(at_s=0.0)[0].latency_factor == pytest.approx(1.0, rel=0.05)


def test_a_link_that_no_model_knows_is_passed_over() -> None:
    links = LinkEstimates()
    assert probe(links, 1.0, 1.0, 3) == []
    links.set_model(model())
    assert links.observe("b", "c", SMALL, 9.0, 1.0) == []
    assert links.observe("b", "c", SMALL, 90.0, 2.0) == []


def test_estimates_scale_the_links_of_a_problem() -> None:
    problem = tiny_problem(1)
    one, other = problem.nodes[0].name, problem.nodes[1].name
    changed = under_estimates(problem, Estimates(links=(LinkEstimate(one, other, 3.0, 4.0), LinkEstimate("?", one))))
    assert changed.link_latency_s[0, 1] == 3 * problem.link_latency_s[0, 1]
    assert changed.link_bandwidth_bytes_per_s[0, 1] == problem.link_bandwidth_bytes_per_s[0, 1] / 4
    assert np.array_equal(changed.link_latency_s[1:], problem.link_latency_s[1:], equal_nan=True)


def test_a_pass_whose_time_between_nodes_jumps_names_the_links_of_its_route() -> None:
    estimate = ClusterEstimate((), "a")

    def passed(index: int, hops_s: float, start: int = 9, epoch: int = 2) -> list[tuple[str, str]]:
        segments = tuple(SegmentTime(node, i, i, 0.0, 0.01, 0.0, 1, 0) for i, node in enumerate(("a", "b", "c", "c")))
        return estimate.suspects(PassTime(epoch, start, 1, 0.1 * index, 0.04 + hops_s, segments))

    assert [passed(index, 0.03) for index in range(20)] == [[]] * 20
    assert passed(20, 5.0, start=0) == []  # a prompt is forwarded in parts
    assert passed(20, 5.0, epoch=1) == []  # of a session that has not moved yet
    assert passed(21, 0.25) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert [passed(22 + index, 0.03) for index in range(3)] == [[]] * 3
    assert route_hops("a", ("a", "a")) == []


def test_passes_that_follow_without_the_gateway_are_compared_with_their_like() -> None:
    estimate = ClusterEstimate((), "a")
    segments = tuple(SegmentTime(node, i, i, 0.0, 0.01, 0.0, 1, 0) for i, node in enumerate(("b", "c", "b")))

    def passed(index: int, hops_s: float, followed: bool) -> list[tuple[str, str]]:
        return estimate.suspects(PassTime(2, 9, 1, 0.1 * index, 0.03 + hops_s, segments, followed))

    # The links from and to the gateway take 0.2 s.
    assert [passed(index, 0.03 if index % 5 else 0.23, index % 5 > 0) for index in range(40)] == [[]] * 40
    assert passed(41, 0.4, followed=True) == [("b", "c"), ("c", "b")]
    assert passed(45, 0.6, followed=False) == [("a", "b"), ("b", "c"), ("c", "b"), ("b", "a")]
