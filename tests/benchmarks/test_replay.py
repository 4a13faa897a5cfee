"""The replay of a run tells what the processes of its cluster added."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.replay import overheads
from resplit.policies import make_policy
from resplit.records import RunRecord
from resplit.simulate.overheads import Overheads
from resplit.simulate.run import Physics, simulate
from resplit.simulate.world import World

ADDED = Overheads(request_s=0.003, token_s=0.0015, batch_s=0.0012)


def test_what_was_added_to_a_run_is_found_again() -> None:
    world = World.load(Path("data/scenarios/calm.yaml"))
    cluster = world.cluster
    one, other = cluster.trusted[:2]  # a single node would begin passes itself, without the gateway
    half = len(world.features) // 2
    placement = (*[one] * half, *[other] * (len(world.features) - half))

    def run(added: Overheads) -> RunRecord:
        physics = replace(Physics(), overheads=added)
        return simulate(
            cluster, world.features, world.scenario, world.arrivals(3), make_policy("static"), name="static", seed=3,
            physics=physics, script=[(0.0, placement)],
        )  # fmt: skip

    plain = run(Overheads())
    found, without = overheads(run(ADDED), plain), overheads(plain, plain)
    assert found["request_ms"] == pytest.approx(3.0, rel=0.1)
    assert found["token_ms"] == pytest.approx(1.5, rel=0.1)
    assert without["request_ms"] == pytest.approx(0.0, abs=0.1)
    assert without["batch_ms"] < 0.2
    assert 1.2 < found["batch_ms"] < 1.9  # some wait for others, too
