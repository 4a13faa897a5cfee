"""What is simulated is what the scenario file names: its cluster, its model and its traces."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from resplit.errors import DataError
from resplit.simulate.command import run_policy
from resplit.simulate.world import World

SCENARIOS = Path("data/scenarios")


def test_a_scenario_names_its_model() -> None:
    world = World.load(SCENARIOS / "llama-7b.yaml")
    assert sum(block.weight_bytes for block in world.features) == pytest.approx(3.79e9, rel=0.01)
    assert len(world.features) == 34


def test_a_token_of_the_7b_model_takes_as_long_as_was_published() -> None:
    world = World.load(SCENARIOS / "llama-7b.yaml")
    published_s = {"office": 0.43484, "store": 1.30794, "vm": 0.10106}
    for name, token_s in published_s.items():
        emulate = world.cluster.node(name).emulate
        assert emulate is not None
        parts = emulate.decode_per_token.parts()
        assert 32 * sum(parts["layer"]) + sum(parts["head"]) == pytest.approx(token_s, rel=0.01)


def test_half_an_hour_of_the_7b_model_is_served_over_several_devices() -> None:
    record, found = run_policy(World.load(SCENARIOS / "llama-7b.yaml"), "static", 1)
    assert len(set(str(record.epochs.placement.iloc[0]).split(","))) > 1
    assert (found.metrics.completed, found.metrics.privacy_violations) == (found.metrics.offered, 0)


def test_traces_are_read_from_the_folder_that_is_given(tmp_path: Path) -> None:
    requests = "arrival_s,prompt_tokens,output_tokens\n0.0,374,44\n4.0,396,109\n5.0,396,109\n"
    (tmp_path / "llm_azure2023_conv.csv").write_text(requests)
    with pytest.raises(DataError, match=r"node_bitbrains_week.csv.gz: cannot be read.*data/traces/README.md"):
        World.load(SCENARIOS / "chat-hours.yaml", traces=tmp_path)
    vms = "".join(f"{vm},{time_s},600,0.5,1\n" for vm in (997, 281) for time_s in (0, 600))
    with gzip.open(tmp_path / "node_bitbrains_week.csv.gz", "wt") as file:
        file.write("vm,time_s,duration_s,cpu_utilization,cpu_cores\n" + vms)
    world = World.load(SCENARIOS / "chat-hours.yaml", traces=tmp_path)
    chat = [arrival for arrival in world.arrivals(1) if arrival.request_class == "chat"]
    assert [(each.at_s, each.prompt_tokens, each.new_tokens) for each in chat] == [(0.0, 11, 2), (20.0, 12, 3)]
    assert {change.node for change in world.scenario.nodes} == {"study", "garage"}
