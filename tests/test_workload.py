"""A workload is fixed by its seed, and requests arrive as a Poisson process at the rate of the moment."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.config import ClusterConfig, load_cluster
from resplit.scenario import LoadChange, ScenarioConfig
from resplit.workload import schedule_requests
from tests.support.properties import examples

ROOT = Path(__file__).parents[1]
WORDS = (ROOT / "data" / "prompts.txt").read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def home() -> ClusterConfig:
    return load_cluster(ROOT / "data" / "clusters" / "home.yaml")


def scenario(duration_s: float, *rates: tuple[float, float]) -> ScenarioConfig:
    changes = [LoadChange(at=f"{at} s", request_class="chat", rate_rps=rate, label="load") for at, rate in rates]
    return ScenarioConfig(name="test", duration=f"{duration_s} s", load=tuple(changes))


@examples(30)
@given(seed=st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_workload(home: ClusterConfig, seed: int) -> None:
    first, second = (schedule_requests(home, scenario(40), seed, WORDS) for _ in range(2))
    assert first == second
    assert [each.at_s for each in first] == sorted(each.at_s for each in first)
    assert all(0 <= each.at_s < 40 and each.new_tokens >= 1 and each.prompt for each in first)


def test_a_change_of_one_class_does_not_affect_the_others(home: ClusterConfig) -> None:
    calm, surge = (schedule_requests(home, each, 3, WORDS) for each in (scenario(60), scenario(60, (30, 5.0))))
    assert [a for a in calm if a.request_class == "batch"] == [a for a in surge if a.request_class == "batch"]
    assert [a for a in calm if a.at_s < 30] == [a for a in surge if a.at_s < 30]


def test_rates_follow_the_scenario(home: ClusterConfig) -> None:
    arrivals = [a for a in schedule_requests(home, scenario(4000, (2000, 2.0)), 1, WORDS) if a.request_class == "chat"]
    declared = home.classes[0].rate_rps
    for count, expected in (
        (sum(a.at_s < 2000 for a in arrivals), 2000 * declared),
        (sum(a.at_s >= 2000 for a in arrivals), 2000 * 2.0),
    ):
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_a_rate_of_zero_stops_arrivals(home: ClusterConfig) -> None:
    arrivals = schedule_requests(home, scenario(500, (100, 0.0)), 1, WORDS)
    assert not [a for a in arrivals if a.request_class == "chat" and a.at_s >= 100]
