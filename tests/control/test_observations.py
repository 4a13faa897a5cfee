"""A recording begins with the cost model with which its observations were compared, also after that was dropped."""

from __future__ import annotations

from dataclasses import replace

from resplit.control.observations import Observations
from resplit.estimate import NodeSeen, Observation
from tests.support.constant_passes import constant_model

ONE = constant_model()
OTHER = replace(ONE, fitted_at_s=1.0)


def reports(*times_s: float) -> list[Observation]:
    return [Observation(at_s, node=NodeSeen("alpha", 0.03, 0.0)) for at_s in times_s]


def kept(seen: list[Observation], most: int = 100) -> tuple[Observation, ...]:
    observations = Observations(most)
    for each in seen:
        observations.add(each)
    return observations.since_model()


def test_what_was_seen_before_the_first_model_is_left_out() -> None:
    assert kept(reports(0.0, 1.0)) == ()
    later = [Observation(2.0, cost=ONE), *reports(3.0, 4.0)]
    assert kept([*reports(0.0, 1.0), *later]) == tuple(later)


def test_only_the_latest_are_kept_after_the_model_that_was_set_before_them() -> None:
    seen = [Observation(0.0, cost=ONE), *reports(1.0, 2.0, 3.0)]
    assert kept(seen, most=4) == tuple(seen)
    assert kept(seen, most=3) == (Observation(1.0, cost=ONE), *seen[1:])
    assert kept(seen, most=2) == (Observation(2.0, cost=ONE), *seen[2:])


def test_a_later_model_takes_the_place_of_one_that_was_dropped() -> None:
    seen = [Observation(0.0, cost=ONE), *reports(1.0), Observation(2.0, cost=OTHER), *reports(3.0, 4.0)]
    assert kept(seen, most=3) == (Observation(2.0, cost=ONE), *seen[2:])
    assert kept(seen, most=2) == (Observation(3.0, cost=OTHER), *seen[3:])
