"""A calm hour: noise, hiccups of hosts and late messages, and hardly an alarm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resplit.cost import CostModel, LinkModel
from resplit.estimate import Change, ClusterEstimate
from resplit.pass_times import PassTime
from tests.estimate.test_cluster import FEATURES, LAYER_S, a_pass, model

HOUR_S = 3600.0
EVERY_S = 0.2  # two streams, each with a token in 0.4 s
NOISE = 0.03  # of a time, as a share
HICCUP_S = 0.03  # mean delay of a host that does something else for a moment
STALLS = 0.001  # share of times that are late: at each node one in 100 s
MOST_ALARMS = 1  # in an hour


def delayed(rng: np.random.Generator, seconds: float, share: float) -> float:
    """A time with noise, which is late with a probability of `share`."""
    late_s = float(rng.exponential(HICCUP_S)) if rng.random() < share else 0.0
    return float(seconds * np.exp(NOISE * rng.standard_normal()) + late_s)


def calm_pass(rng: np.random.Generator, at_s: float) -> PassTime:
    done = a_pass(at_s)
    segments = []
    for segment in done.segments:
        first_s, second_s = (delayed(rng, segment.computed_s / 2, STALLS) for _ in range(2))
        segments.append(replace(segment, computed_s=first_s + second_s, first_half_s=first_s))
    computed_s = sum(segment.computed_s + segment.waited_s for segment in segments)
    return replace(done, segments=tuple(segments), total_s=computed_s + delayed(rng, 0.02, STALLS))


def linked(cost: CostModel) -> CostModel:
    pairs = [(one, other) for one in LAYER_S for other in LAYER_S if one != other]
    return replace(cost, links=tuple(LinkModel(one, other, 0.004, 1 / 4e7, 0.0, 0.0, 9) for one, other in pairs))


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
