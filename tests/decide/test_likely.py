"""Likely changes: which there are, in which order, and the problems after them."""

from __future__ import annotations

import numpy as np

from resplit.decide.likely import FARTHER_S, MORE_LOAD, NARROWER, SLOWER, likely_changes
from tests.support.decisions import FAST, SLOW, halves, problem

CURRENT = halves(FAST, SLOW, 2)


def test_used_nodes_are_lost_or_slow_used_links_degraded_and_the_load_doubled_the_busiest_node_first() -> None:
    words = [change.words for change in likely_changes(problem(CURRENT))]
    assert words == [
        f"{SLOW} lost",
        f"{SLOW} 5 times slower",
        f"{FAST} lost",
        f"{FAST} 5 times slower",
        f"the link between {FAST} and {SLOW} degraded",
        "2 times the load",
    ]


def test_each_problem_differs_in_what_its_words_say_alone() -> None:
    before = problem(CURRENT)
    lost, slow, *_, link, load = likely_changes(before)
    names = [node.name for node in before.nodes]
    node, other = names.index(SLOW), names.index(FAST)
    expected = before.decode_s_per_token.copy()
    expected[:, node] *= SLOWER
    np.testing.assert_array_equal(slow.problem.decode_s_per_token, expected)
    assert (slow.lost, lost.lost) == (None, SLOW)
    assert np.isnan(lost.problem.prefill_s_per_token[:, node]).all()
    assert np.isfinite(lost.problem.prefill_s_per_token[:, other]).all()
    added_s = link.problem.link_latency_s - before.link_latency_s
    assert {tuple(place) for place in np.argwhere(added_s > 0).tolist()} == {(node, other), (other, node)}
    assert added_s[node, other] == np.float64(FARTHER_S) or np.isclose(added_s[node, other], FARTHER_S)
    ratio = before.link_bandwidth_bytes_per_s[node, other] / link.problem.link_bandwidth_bytes_per_s[node, other]
    assert np.isclose(ratio, NARROWER)
    assert load.problem.classes[0].rate_rps == MORE_LOAD * before.classes[0].rate_rps
    assert all(each.problem.current == CURRENT for each in (slow, lost, link, load))
