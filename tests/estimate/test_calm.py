"""A calm hour: noise, hiccups of hosts and late messages, and hardly an alarm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.estimate import Change, ClusterEstimate
from tests.support.near_and_far import EVERY_S, FEATURES, STALLS, calm_pass, delayed, linked, model

HOUR_S = 3600.0
MOST_ALARMS = 1  # in an hour


def calm_hour(seed: int) -> list[Change]:
    """The alarms of an hour without any change."""
    rng, estimate = np.random.default_rng(seed), ClusterEstimate(FEATURES, "near")
    estimate.set_model(linked(model()))
    alarms: list[Change] = []
    for index, at_s in enumerate(np.arange(0.0, HOUR_S, EVERY_S).tolist()):
        alarms += estimate.observe(calm_pass(rng, at_s))
        if index % 3 == 0:  # a node without blocks, whose owner uses a little of it now and then
            alarms += estimate.observe_report("spare", float("nan"), float(rng.beta(1, 30)), at_s)
        if index % 10 == 0:
            for size, seconds in ((64, 0.004), (32 * 1024, 0.004 + 32 * 1024 / 4e7)):
                alarms += estimate.links.observe("near", "far", size, delayed(rng, seconds, 3 * STALLS), at_s)
    return alarms


@pytest.mark.parametrize("seed", range(2))
def test_a_calm_hour_has_at_most_one_false_alarm(seed: int) -> None:
    alarms = calm_hour(seed)
    assert len(alarms) <= MOST_ALARMS, [str(alarm) for alarm in alarms]


def test_a_node_that_slows_down_is_noticed_in_its_second_batch_and_a_stall_of_one_batch_is_not() -> None:
    rng, estimate = np.random.default_rng(0), ClusterEstimate(FEATURES, "near")
    estimate.set_model(model())
    for index in range(50):
        assert estimate.observe(calm_pass(rng, index * EVERY_S)) == []
    segment = (done := calm_pass(rng, 10.0)).segments[1]
    stall = replace(segment, computed_s=segment.computed_s + 0.5, first_half_s=segment.first_half_s + 0.25)
    assert estimate.observe(replace(done, segments=(done.segments[0], stall))) == []
    assert estimate.observe(replace(done, at_s=10.03, segments=(done.segments[0], stall))) == []  # of the same batch
    assert estimate.observe(calm_pass(rng, 10.1)) == []
    slow = replace(segment, computed_s=5 * segment.computed_s, first_half_s=5 * segment.first_half_s)
    assert estimate.observe(replace(done, at_s=10.2, segments=(done.segments[0], slow))) == []
    slow = replace(slow, computed_s=1.01 * slow.computed_s)
    changes = estimate.observe(replace(done, at_s=10.4, segments=(done.segments[0], slow)))
    assert [change.subject for change in changes] == [segment.node]
    assert changes[0].after == pytest.approx(5.0, rel=0.3)
