"""`python -m benchmarks.serving.counts`: what each process of a cluster does for a token, beside compute.

Two nodes share the model, and 8 streams decode. The table has how often a process did something, over the tokens that
all streams got meanwhile. Heartbeats, probes and reports are included. Counting takes time of its own, so nothing is
timed here, and how many streams share a pass depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from benchmarks.serving.clusters import Setup, serving
from benchmarks.serving.load import decode_rate
from resplit.cluster import local
from resplit.cluster.local import Cluster
from resplit.config import LimitsConfig
from resplit.security.identity import CONTROLLER

STREAMS, NEW_TOKENS = 8, 192


def counts(models: Path, weights: str, copy_every: int) -> dict[str, dict[str, float]]:
    """What was counted for a token, by process."""
    usual = local._command
    local._command = _counted_command
    try:
        with serving(Setup(2, weights, copy_every), models) as cluster:
            decode_rate(cluster.url, STREAMS, new_tokens=16)
            before = _counted(cluster)
            decode_rate(cluster.url, STREAMS, prompt_tokens=8, new_tokens=NEW_TOKENS)
            after = _counted(cluster)
    finally:
        local._command = usual
    tokens = STREAMS * NEW_TOKENS
    return {
        process: {what: (number - before[process].get(what, 0)) / tokens for what, number in found.items()}
        for process, found in after.items()
    }


def _counted_command(cluster: Cluster, name: str) -> list[str]:
    """The usual command of a process, with what it does counted in a file of the state folder."""
    arguments = ["serve", str(cluster.state / "cluster.yaml"), "--port", cluster.url.rpartition(":")[2]]
    if name == CONTROLLER:
        arguments += ["--model", cluster.model]
    else:
        arguments = ["node", str(cluster.state / "cluster.yaml"), "--name", name]
    arguments += ["--state", str(cluster.state), "--end-with-parent"]
    return [sys.executable, "-m", "benchmarks.serving.counted_process", str(_file(cluster, name)), *arguments]


def _counted(cluster: Cluster) -> dict[str, dict[str, int]]:
    """What each process has counted so far."""
    for name, process in cluster.processes.items():
        _file(cluster, name).unlink(missing_ok=True)
        process.send_signal(signal.SIGUSR1)
    while not all(_file(cluster, name).exists() for name in cluster.processes):
        time.sleep(0.01)
    return {name: json.loads(_file(cluster, name).read_text(encoding="utf-8")) for name in cluster.processes}


def _file(cluster: Cluster, name: str) -> Path:
    return cluster.state / f"counted-{name}.json"


def main() -> None:
    """Count, and print a table for each number of positions in a copy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.counts", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"), help="packaged models")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--copy-every", type=int, nargs="+", default=[0, LimitsConfig().copy_every])
    given = parser.parse_args()
    for copy_every in given.copy_every:
        found = counts(given.models, given.weights, copy_every)
        names = [CONTROLLER, *(name for name in found if name != CONTROLLER)]
        print(f"\ncopies every {copy_every} positions\n\n| for a token | {' | '.join(names)} |")
        print("| --- |" + " --- |" * len(names))
        for what in dict.fromkeys(what for each in found.values() for what in each):
            print(f"| {what} | {' | '.join(f'{found[name].get(what, 0.0):.2f}' for name in names)} |")


if __name__ == "__main__":
    main()
