"""A run beside its simulation."""

from __future__ import annotations

from pathlib import Path

from resplit.metrics import summarise
from resplit.simulate.command import run_policy
from resplit.simulate.replay import replayed
from resplit.simulate.run import Physics
from resplit.simulate.world import World
from tasks.reality import reality_rows, replays_of

SCENARIO, CLUSTER = Path("data/scenarios/home-day.yaml"), Path("data/clusters/home.yaml")
MODEL = "SmolLM2-135M-Instruct"


def test_a_simulated_run_is_simulated_again_as_it_was() -> None:
    world = World.load(SCENARIO)
    run, _ = run_policy(world, "clairvoyant", 3)
    again = replayed(world, run, Physics())
    assert again.requests.arrival_s.tolist() == run.requests.arrival_s.tolist()
    assert again.epochs.placement.tolist() == run.epochs.placement.tolist()
    assert abs(summarise(again).latency_mean_s / summarise(run).latency_mean_s - 1) < 0.1
    replays = replays_of([run], MODEL, SCENARIO, CLUSTER)
    assert [row[0] for row in reality_rows({"clairvoyant": run}, replays)] == ["clairvoyant"]


def test_a_model_or_hardware_that_the_simulator_does_not_know_is_not_simulated(tmp_path: Path) -> None:
    run, _ = run_policy(World.load(SCENARIO), "static", 3)
    assert replays_of([run], "another/model", SCENARIO, CLUSTER) == {}
    real = tmp_path / "real.yaml"
    real.write_text(CLUSTER.read_text().replace("emulate:", "labels:"))
    assert replays_of([run], MODEL, SCENARIO, real) == {}
    assert reality_rows({"static": run}, {}) == []
