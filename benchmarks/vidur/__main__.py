"""Queueing on a pipeline of equal stages, simulated by resplit and by Vidur.

    python -m venv /tmp/vidur && /tmp/vidur/bin/pip install vidur==0.0.26
    python -m benchmarks.vidur --vidur /tmp/vidur/bin/python

Vidur has an environment of its own, because its dependencies are not ours. Both get the same arrivals, and both take
F + m n seconds for a pass of n requests through a stage: what differs is queueing and batching. One line of JSON for
each case, with the mean and the 95th percentile of the latencies, in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from resplit.workload import Arrival
from tests.support.networks import hardware, latencies, poisson

IN_VIDUR = Path(__file__).with_name("in_vidur.py")


@dataclass(frozen=True)
class Case:
    """`requests` requests of `passes` passes each, through `stages` stages in which a pass of n takes F + m n.

    At most `most` requests share a pass.
    """

    stages: int
    fixed_s: float
    session_s: float
    rate_rps: float
    passes: int
    most: int
    requests: int

    def arrivals(self) -> list[Arrival]:
        """A Poisson process, the same each time."""
        return list(itertools.islice(poisson(self.rate_rps, lambda rng: self.passes, seed=7), self.requests))


CASES = (
    *(Case(stages, 0.0, 0.05, rate_rps, 1, 1, 4000) for stages in (2, 4) for rate_rps in (10.0, 16.0, 19.0)),
    *(Case(stages, 0.02, 0.002, rate_rps, 16, 32, 1000) for stages in (2, 4) for rate_rps in (1.0, 4.0, 8.0)),
)


def in_resplit(case: Case, arrivals: Sequence[Arrival]) -> list[float]:
    """The latency of each request, by the machines and the gateway of the simulator."""
    machines = [hardware(case.fixed_s, case.session_s)] * case.stages
    return [latency_s for _, latency_s in latencies(machines, iter(arrivals), len(arrivals))]


def in_vidur(case: Case, arrivals: Sequence[Arrival], python: Path) -> list[float]:
    """The same by Vidur, with its Sarathi scheduler."""
    given = asdict(case) | {"arrivals_s": [arrival.at_s for arrival in arrivals]}
    done = subprocess.run([python, IN_VIDUR], input=json.dumps(given), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} {IN_VIDUR} failed:\n{done.stderr}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print what both find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vidur", type=Path, required=True, help="the Python of an environment that has Vidur")
    python = parser.parse_args().vidur
    for case in CASES:
        arrivals = case.arrivals()
        found = {"resplit": in_resplit(case, arrivals), "vidur": in_vidur(case, arrivals, python)}
        told = {
            f"{name}_{what}": round(value, 4)
            for name, each in found.items()
            for what, value in (("mean_s", float(np.mean(each))), ("p95_s", float(np.percentile(each, 95))))
        }
        sys.stdout.write(json.dumps(asdict(case) | told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
