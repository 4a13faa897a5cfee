"""Replays runs of real clusters in the simulator, and says how far apart they are.

    python -m benchmarks.replay SCENARIO.yaml RUN_FOLDER...

A run folder is what `RunRecord.save` wrote; studies keep them as the MLflow artifact `record`. The simulator gets the
requests and the placements of the run, each live at the time at which it was, and predicts their latencies.

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

from resplit.metrics import epoch_latency, summarise
from resplit.records import RunRecord
from resplit.simulate.replay import replayed
from resplit.simulate.run import Physics
from resplit.simulate.world import World

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


def main() -> None:
    """Print one JSON object for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--cluster", type=Path, help="by default the cluster that the scenario names")
    parser.add_argument("--model", type=Path, help="the sizes of the model's blocks")
    parser.add_argument("--hop-ms", type=float, default=1.0, help="what software adds to a message (default: 1)")
    parser.add_argument("--fit-batches", action="store_true", help="batches take as long as those of the run did")
    given = parser.parse_args()
    world, physics = (
        World.load(given.scenario, given.cluster, given.model),
        replace(Physics(), hop_s=given.hop_ms / 1e3),
    )
    for folder in given.runs:
        run = RunRecord.load(folder)
        for column in ("waited_s", "computed_s", "hops_s"):  # records of earlier versions lack them
            if column not in run.requests:
                run.requests[column] = math.nan
        its = fitted(world, run, physics) if given.fit_batches else physics
        found = compared(run, replayed(world, run, its)) | {"batch_factor": round(its.batch_factor, 3)}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
