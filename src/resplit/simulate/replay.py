"""A run of a real cluster, simulated: the same requests, and the same placements at the same times."""

from __future__ import annotations

from resplit.comparison import UNDISTURBED
from resplit.policies import make_policy
from resplit.records import RunRecord
from resplit.simulate.run import Physics, simulate
from resplit.simulate.world import World
from resplit.workload import Arrival

__all__ = ["replayed"]


def replayed(world: World, run: RunRecord, physics: Physics | None = None) -> RunRecord:
    """The record of the simulated run. Only its latencies are predicted: nothing is decided in it."""
    asked, epochs = run.requests.sort_values("arrival_s"), run.epochs
    columns = (asked.arrival_s, asked.request_class, asked.prompt_tokens, asked.new_tokens)
    arrivals = [
        Arrival(float(at_s), str(name), max(1, int(prompt)), max(1, int(new)))
        for at_s, name, prompt, new in zip(*columns, strict=True)
    ]
    script = [
        (max(0.0, float(at_s)), tuple(str(placement).split(",")))
        for at_s, placement in zip(epochs.time_s, epochs.placement, strict=True)
    ]
    scenario = world.scenario.model_copy(update={"duration": run.duration_s})
    if run.scenario == UNDISTURBED:
        scenario = scenario.model_copy(update={"nodes": (), "links": (), "load": ()})
    return simulate(
        world.cluster, world.features, scenario, arrivals, make_policy("static"), name=run.policy, seed=run.seed,
        physics=physics, script=script,
    )  # fmt: skip
