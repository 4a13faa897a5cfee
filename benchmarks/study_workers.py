"""How much faster a simulated study is with more workers.

    python -m benchmarks.study_workers [--workers 1 2 4] [--runner processes]

The same runs are simulated anew for each number of workers: `static` and `resplit` on `home-day`, over several seeds.
Prints one line of JSON for each, with the seconds of the study and how many times that is faster than with the first.
Do it on a machine that does nothing else.
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from flows.params import SimulatedParams
from flows.simulated import run_simulated_study

POLICIES, SCENARIOS = ("static", "resplit"), ("home-day",)


def seconds(runner: str, workers: int, seeds: int) -> float:
    """What a study takes of which nothing was done before."""
    params = SimulatedParams.model_validate(
        {
            "scenarios": SCENARIOS,
            "policies": POLICIES,
            "first_seed": 1,
            "seeds": seeds,
            "runner": runner,
            "workers": workers,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        begun_s = time.monotonic()
        run_simulated_study(params, *(Path(folder) / name for name in ("state", "records", "reports")))
        return time.monotonic() - begun_s


def main() -> None:
    """Print one JSON object for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runner", choices=["processes", "dask", "ray"], default="processes")
    parser.add_argument("--seeds", type=int, default=6)
    given = parser.parse_args()
    first_s = None
    for workers in given.workers:
        took_s = seconds(given.runner, workers, given.seeds)
        first_s = first_s or took_s
        found = {"runner": given.runner, "workers": workers, "seconds": round(took_s, 1)}
        sys.stdout.write(json.dumps(found | {"speed_up": round(first_s / took_s, 2)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
