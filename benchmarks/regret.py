"""Where the regret of `resplit` comes from: when it moves, what moving costs, and which placements it takes.

    python -m benchmarks.regret SCENARIO.yaml... [--seeds 3] [--first-seed 1]

The workload is simulated again with the placements of the run: live at the same times, at no cost; and live as soon as
the phase of the scenario begins in which they were the last ones. One line of JSON for each scenario and seed, with
mean latencies in seconds. `moving_s` is what is saved when moves cost nothing, `late_s` what is saved when they come
at once too, and `placement_s` is the rest of the distance to the oracle.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from resplit.decide.state import Placement
from resplit.metrics import summarise
from resplit.phases import phases_of
from resplit.policies import make_policy
from resplit.records import RunRecord
from resplit.simulate.command import run_oracle, run_policy
from resplit.simulate.run import simulate
from resplit.simulate.world import World

POLICIES = ("static", "clairvoyant", "resplit")  # that the oracle compares
_AFTER_S = 1e-6  # a placement changes right after the scenario does

Script = Sequence[tuple[float, Placement]]


def taken_apart(world: World, seed: int) -> dict[str, object]:
    """The regret of one run, in parts."""
    runs = [run_policy(world, policy, seed)[0] for policy in POLICIES]
    oracle, found = run_oracle(world, seed, runs)[0], runs[-1]
    script = _played(found)
    took_s = [_mean_s(found), _mean_s(_free(world, seed, script)), _mean_s(_free(world, seed, _at_once(world, script)))]
    parts_s = [before - after for before, after in zip(took_s, [*took_s[1:], _mean_s(oracle)], strict=True)]
    names = ("moving_s", "late_s", "placement_s")
    means_s = {"oracle_s": _mean_s(oracle), "resplit_s": took_s[0]} | dict(zip(names, parts_s, strict=True))
    return {"scenario": world.scenario.name, "seed": seed} | {name: round(value, 3) for name, value in means_s.items()}


def _played(run: RunRecord) -> Script:
    """The placements that a run had live, with the times from which on."""
    epochs = zip(run.epochs.time_s, run.epochs.placement, strict=True)
    return [(float(time_s), tuple(str(placement).split(","))) for time_s, placement in epochs]


def _at_once(world: World, script: Script) -> Script:
    """The last placement of each phase, from its beginning on."""
    begins_s = [phase.at_s for phase in phases_of(world.cluster, world.scenario)]
    ends_s = [*begins_s[1:], math.inf]
    last = [next(each for at_s, each in reversed(script) if at_s < end_s) for end_s in ends_s]
    return [(begin_s + _AFTER_S if begin_s else 0.0, each) for begin_s, each in zip(begins_s, last, strict=True)]


def _free(world: World, seed: int, script: Script) -> RunRecord:
    return simulate(
        world.cluster, world.features, world.scenario, world.arrivals(seed), make_policy("static"), name="free",
        seed=seed, loop=world.loop(), script=script, free_moves=True,
    )  # fmt: skip


def _mean_s(run: RunRecord) -> float:
    return summarise(run).latency_mean_s


def main() -> None:
    """Print one JSON object for each scenario and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    given = parser.parse_args()
    for scenario in given.scenarios:
        world = World.load(scenario)
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            sys.stdout.write(json.dumps(taken_apart(world, seed)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
