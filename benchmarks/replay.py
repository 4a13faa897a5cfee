"""Replays runs of real clusters in the simulator, and says how far apart they are.

    python -m benchmarks.replay SCENARIO.yaml RUN_FOLDER...

A run folder is what `RunRecord.save` wrote; studies keep them as the MLflow artifact `record`. The simulator gets the
requests and the placements of the run, each live at the time at which it was, and predicts their latencies.

Batches, tokens and requests take what the processes of a cluster add, as was measured, and probes and KV replicas take
bandwidth (`resplit.simulate.overheads`). With `--declared` only what the cluster file declares. With `--overheads` the
line says instead what they add, as measured in the run and in its replay.

With `--fit-batches` each run is simulated twice. The first time says how much longer its batches took than declared,
and the second time they take that long. Then the time in batches is fitted, and all other figures are predicted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from resplit.metrics import completed, epoch_latency, summarise
from resplit.records import RunRecord
from resplit.simulate.overheads import MEASURED, NO_OVERHEADS
from resplit.simulate.replay import replayed
from resplit.simulate.run import Physics
from resplit.simulate.world import World
from resplit.types import FloatArray, segments_of

_COMPARED = ("latency_mean_s", "latency_p95_s", "first_token_mean_s", "time_per_token_s", "waited_mean_s",
             "computed_mean_s", "hops_mean_s", "qos_met")  # fmt: skip


def compared(run: RunRecord, simulated: RunRecord) -> dict[str, object]:
    """Measured and simulated metrics, and for each configuration the relative error of its latency."""
    real, ours = summarise(run), summarise(simulated)
    # A run may end before its last epoch serves a request, so that only one of the two tables has it.
    tables = (epoch_latency(each).to_dict("records") for each in (run, simulated))
    epochs = zip(*tables, strict=False)
    return {
        "policy": run.policy,
        "scenario": run.scenario,
        "emulation_error": round(run.emulation_error, 3),
        "metrics": {
            name: [round(getattr(real, name), 4), round(getattr(ours, name), 4)] for name in _COMPARED
        },
        "configurations": [
            [one["requests"], round(one["measured_latency_s"], 4), round(other["measured_latency_s"], 4)]
            for one, other in epochs
        ],
    }  # fmt: skip


def fitted(world: World, run: RunRecord, physics: Physics) -> Physics:
    """`physics` in which batches take as much longer than declared as those of the run did, in the mean of requests."""
    measured_s = summarise(run).computed_mean_s
    simulated_s = summarise(replayed(world, run, physics)).computed_mean_s
    return replace(physics, batch_factor=measured_s / simulated_s)


_MOST_S = 0.03  # outside passes, of a request that no move delayed
_NO_WAIT_S = 0.002


def overheads(run: RunRecord, plain: RunRecord) -> dict[str, float]:
    """What the processes of a run add, in milliseconds. `plain` is its replay in which they add nothing.

    `request_ms` and `token_ms` are a line over the tokens of each request, through its time outside passes. `batch_ms`
    is the mean wait for a segment, of the requests that wait for no other in `plain`. Some of them do in `run`.
    """
    real, ours = (each.requests.sort_values("arrival_s").reset_index(drop=True) for each in (run, plain))
    kept = completed(real) & completed(ours) & (real.epochs == 1) & (ours.epochs == 1)
    outside_s = real.end_s - real.arrival_s - real.waited_s - real.computed_s - real.hops_s
    undelayed, alone = kept & (outside_s < _MOST_S), kept & (ours.waited_s < _NO_WAIT_S)
    token_s, request_s = np.polyfit(real.new_tokens[undelayed] - 1, outside_s[undelayed], 1)
    waits_s = real.waited_s / (real.new_tokens * _segments(run, real.arrival_s.to_numpy()))
    found_s = {"request_ms": request_s, "token_ms": token_s, "batch_ms": waits_s[alone].mean()}
    return {name: round(1e3 * float(seconds), 2) for name, seconds in found_s.items()}


def _segments(run: RunRecord, at_s: FloatArray) -> FloatArray:
    """How many segments the route had that was live at each time."""
    epochs = run.epochs.sort_values("time_s")
    counts = [len(segments_of(tuple(str(each).split(",")))) for each in epochs.placement]
    live = np.searchsorted(epochs.time_s.to_numpy(), at_s, side="right") - 1
    found: FloatArray = np.array(counts, dtype=float)[live.clip(0)]
    return found


def main() -> None:
    """Print one JSON object for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--cluster", type=Path, help="by default the cluster that the scenario names")
    parser.add_argument("--model", type=Path, help="the sizes of the model's blocks")
    parser.add_argument("--hop-ms", type=float, default=1.0, help="what software adds to a message (default: 1)")
    parser.add_argument("--fit-batches", action="store_true", help="batches take as long as those of the run did")
    parser.add_argument("--declared", action="store_true", help="the processes of the cluster add nothing")
    parser.add_argument("--overheads", action="store_true", help="what the processes of each run added")
    given = parser.parse_args()
    added = NO_OVERHEADS if given.declared else MEASURED
    world = World.load(given.scenario, given.cluster, given.model)
    physics = replace(Physics(), hop_s=given.hop_ms / 1e3, overheads=added)
    for folder in given.runs:
        run = RunRecord.load(folder)
        for column in ("waited_s", "computed_s", "hops_s"):  # records of earlier versions lack them
            if column not in run.requests:
                run.requests[column] = math.nan
        its = fitted(world, run, physics) if given.fit_batches else physics
        simulated = replayed(world, run, its)
        found = compared(run, simulated) | {"batch_factor": round(its.batch_factor, 3)}
        if given.overheads:
            plain = replayed(world, run, replace(its, overheads=NO_OVERHEADS))
            measured, ours = overheads(run, plain), overheads(simulated, plain)
            found = {"policy": run.policy, "seed": run.seed} | {name: [measured[name], ours[name]] for name in measured}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
