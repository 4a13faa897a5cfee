"""The oracle is a limit: nobody serves better, and it knows what nobody can know."""

from __future__ import annotations

from pathlib import Path

import pytest

from resplit.records import RunRecord
from resplit.simulate.command import run_oracle, run_policy
from resplit.simulate.result import SimulatedResult
from resplit.simulate.world import World

HOME_DAY = Path("data/scenarios/home-day.yaml")


@pytest.fixture(scope="module")
def rivals() -> list[tuple[RunRecord, SimulatedResult]]:
    return [run_policy(World.load(HOME_DAY), name, 7) for name in ("static", "clairvoyant")]


@pytest.fixture(scope="module")
def best(rivals: list[tuple[RunRecord, SimulatedResult]]) -> tuple[RunRecord, SimulatedResult]:
    return run_oracle(World.load(HOME_DAY), 7, [record for record, _ in rivals])


def test_nobody_serves_better_than_the_oracle(
    rivals: list[tuple[RunRecord, SimulatedResult]], best: tuple[RunRecord, SimulatedResult]
) -> None:
    its = best[1].metrics
    for _, found in rivals:
        assert (its.completed, -its.latency_mean_s) >= (found.metrics.completed, -found.metrics.latency_mean_s)
    assert best[1].energy_j_per_request > 0
    assert (best[1].policy, its.privacy_violations) == ("oracle", 0)


def test_its_moves_cost_nothing_and_come_with_the_changes(best: tuple[RunRecord, SimulatedResult]) -> None:
    record, found = best
    assert found.metrics.moved_bytes == 0
    changes_s = record.events[record.events.kind == "change"].time_s
    assert len(record.epochs) > 1
    for time_s in record.epochs.time_s[1:]:
        assert (changes_s - time_s).abs().min() < 0.01


def test_a_placement_whose_node_is_lost_in_a_phase_is_none_for_that_phase() -> None:
    world = World.load(Path("data/scenarios/smart-city.yaml"))
    rival, found = run_policy(world, "clairvoyant", 1)
    lost_s = next(change.at for change in world.scenario.nodes if change.up is False)
    live = rival.epochs[rival.epochs.time_s <= lost_s].placement.iloc[-1]
    assert "cabinet" in live.split(",")  # it moves away when the loss is noticed
    record, best = run_oracle(world, 1, [rival])
    assert best.metrics.completed == found.metrics.completed
    assert best.metrics.latency_mean_s <= found.metrics.latency_mean_s
    during = record.epochs[record.epochs.time_s.between(lost_s, lost_s + 5)]
    assert not any("cabinet" in placement.split(",") for placement in during.placement)
