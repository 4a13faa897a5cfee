"""A simulated run: deterministic, with every request accounted for, and honest about what a policy may see."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from resplit.cli import app
from resplit.decide import Decision, Ready
from resplit.metrics import RunMetrics, summarise
from resplit.policies import Situation, make_policy
from resplit.policies.orchestrator import Orchestrator
from resplit.records import TABLES, RunRecord
from resplit.scenario import NodeChange
from resplit.simulate.command import run_policy
from resplit.simulate.result import SimulatedResult
from resplit.simulate.run import Physics, simulate
from resplit.simulate.world import World
from resplit.workload import Arrival

HOME_DAY = Path("data/scenarios/home-day.yaml")
BEGIN_S = 10.0  # the first moves, and plans that stand ready


@pytest.fixture(scope="module")
def world() -> World:
    return World.load(HOME_DAY)


@pytest.fixture(scope="module")
def resplit(world: World) -> tuple[RunRecord, SimulatedResult]:
    return run_policy(world, "resplit", 7)


def test_the_same_seed_gives_the_same_object_and_the_same_tables(world: World) -> None:
    begin = replace(world, scenario=world.scenario.model_copy(update={"duration": BEGIN_S}))
    (record, found), (again, found_again) = (run_policy(begin, "resplit", 7) for _ in range(2))
    assert found.metrics.reconfigurations > 0
    assert found.to_json() | {"wall_s": 0} == found_again.to_json() | {"wall_s": 0}
    assert record.requests.equals(again.requests)
    assert record.epochs.equals(again.epochs)
    assert record.decisions == again.decisions


def test_the_object_has_the_keys_of_the_metrics(resplit: tuple[RunRecord, SimulatedResult]) -> None:
    record, found = resplit
    names = [field.name for field in dataclasses.fields(RunMetrics)]
    first = ["policy", "scenario", "seed", "simulated_s", "wall_s", "energy_j_per_request"]
    assert list(found.to_json()) == first + names
    assert found.to_json()["latency_mean_s"] == pytest.approx(summarise(record).latency_mean_s, abs=1e-6)


def test_a_result_is_read_as_it_was_printed(resplit: tuple[RunRecord, SimulatedResult]) -> None:
    printed = resplit[1].to_json()
    assert None in printed.values()
    again = SimulatedResult.from_json(json.dumps(printed))
    assert again.to_json() == printed
    assert math.isnan(again.metrics.busy_share_saturated)


def test_reactions_are_counted_as_on_a_cluster(resplit: tuple[RunRecord, SimulatedResult]) -> None:
    record, found = resplit
    changes_s = record.events[record.events.kind == "change"].time_s.tolist()
    assert record.events[record.events.kind == "foreseen"].time_s.isin(changes_s).all()
    counted, moved, live_s = (getattr(found.metrics, f"reaction_{name}") for name in ("changes", "moved", "live_p50_s"))
    assert isinstance(counted, int)
    assert isinstance(live_s, float)
    assert 0 < moved <= counted <= len(set(changes_s))
    assert 0.1 < live_s < 5.0


def test_every_request_offered_ends_and_its_time_is_accounted_for(
    world: World, resplit: tuple[RunRecord, SimulatedResult]
) -> None:
    requests = resplit[0].requests
    assert len(requests) == len(world.arrivals(7))
    done = requests[requests.status == 200]
    assert len(done) == len(requests)
    parts_s = done.waited_s + done.computed_s + done.hops_s
    assert (parts_s <= done.end_s - done.arrival_s + 1e-9).all()
    assert (parts_s >= 0.9 * (done.end_s - done.arrival_s) - 0.2).all()  # the rest is the pause of a move


def test_a_policy_that_adapts_beats_one_that_does_not_when_a_machine_is_taken(
    world: World, resplit: tuple[RunRecord, SimulatedResult]
) -> None:
    _, static = run_policy(world, "static", 7)
    assert resplit[1].metrics.latency_mean_s < 0.6 * static.metrics.latency_mean_s
    assert static.metrics.reconfigurations == 0 < resplit[1].metrics.reconfigurations
    assert resplit[1].metrics.privacy_violations == 0


def test_the_command_prints_one_object_and_leaves_the_tables_of_a_run(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["simulate", str(HOME_DAY), "--policy", "static", "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert (found["policy"], found["scenario"], found["seed"]) == ("static", "home-day", 7)
    assert summarise(RunRecord.load(tmp_path)).offered == found["offered"]
    assert {path.stem for path in tmp_path.glob("*.parquet")} == {*TABLES, "decisions"}


def test_blocks_that_stand_by_need_not_be_loaded(world: World, resplit: tuple[RunRecord, SimulatedResult]) -> None:
    _, without = run_policy(world, "resplit-without-standby", 7)
    assert resplit[1].metrics.moved_bytes < 0.5 * without.metrics.moved_bytes


def test_a_tick_is_told_what_is_ready(world: World) -> None:
    told: list[Ready] = []

    class Noting(Orchestrator):
        def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
            if not situation.changes:
                told.append(situation.ready)
            return super().decide(situation, rng)

    begin = world.scenario.model_copy(update={"duration": BEGIN_S})
    simulate(
        world.cluster, world.features, begin, world.arrivals(7), Noting(),
        name="noting", seed=7, loop=replace(world.loop(), prepares=True),
    )  # fmt: skip
    assert told[0] == Ready()
    assert any(ready.placements and ready.loaded for ready in told)


def test_the_first_move_is_priced_by_how_long_the_first_placement_took_to_load() -> None:
    # A link of 3.6 MB/s leads to the cabinet, but weights come from the registry.
    city = World.load(Path("data/scenarios/smart-city.yaml"))
    city = replace(city, scenario=city.scenario.model_copy(update={"duration": 15.0}))
    record, _ = run_policy(city, "resplit-without-standby", 1)
    first = next(each for each in record.decisions if each.action != "keep")
    assert max(option.weight_bytes for option in first.alternatives) > 50e6
    assert max(option.transfer_s for option in first.alternatives) < 5.0


def test_resplit_plans_only_at_ticks_with_news(resplit: tuple[RunRecord, SimulatedResult]) -> None:
    decisions = resplit[0].decisions
    planned = [each for each in decisions if len(each.alternatives) > 1]
    assert 0 < len(planned) < len(decisions)


def test_without_kv_transfer_caches_are_computed_again_and_no_token_is_lost(world: World) -> None:
    cluster, calm = world.cluster, world.scenario.model_copy(update={"nodes": (), "links": (), "load": ()})
    placements = [(node,) * 16 + ("study",) * 16 for node in ("hub", "study")]
    arrivals = [Arrival(0.1 * number, "chat", 24, 12) for number in range(4)]

    def run(kv_transfer: bool) -> RunRecord:
        return simulate(
            cluster, world.features, calm, arrivals, make_policy("static"), name="scripted", seed=1,
            physics=Physics(kv_transfer=kv_transfer), script=list(zip((0.0, 0.8), placements, strict=True)),
        )  # fmt: skip

    sent, again = run(True), run(False)
    assert (sent.requests.status == 200).all()
    assert (again.requests.status == 200).all()
    assert len(again.tokens) == len(sent.tokens) == 4 * 12
    assert again.epochs.moved_bytes.iloc[-1] == 0 < sent.epochs.moved_bytes.iloc[-1]
    assert (again.requests.epochs == 2).any()
    # What is computed again is computed by the nodes of the new placement.
    assert again.requests.computed_s.sum() > sent.requests.computed_s.sum()


def test_a_request_on_a_lost_node_goes_on_if_the_cluster_has_already_moved_away(world: World) -> None:
    cluster, calm = world.cluster, world.scenario.model_copy(update={"nodes": (), "links": (), "load": ()})
    outage = NodeChange(at="0.9 s", node="garage", up=False, label="garage is unplugged")
    scenario = calm.model_copy(update={"nodes": (outage,)})
    through, around = [("hub",) * 8 + (node,) * 8 + ("study",) * 16 for node in ("garage", "hub")]
    arrivals = [Arrival(0.1 * number, "chat", 24, 12) for number in range(8)]
    record = simulate(
        cluster, world.features, scenario, arrivals, make_policy("static"),
        name="scripted", seed=1, script=[(0.0, through), (1.0, around)],
    )  # fmt: skip
    requests = record.requests
    assert (requests.status == 200).all()
    assert (requests.epochs == 2).any()  # some were under way
    # The loss is noticed half a second after it.
    assert (requests.end_s - requests.arrival_s).max() < 5.0
