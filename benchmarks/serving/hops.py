"""What a token costs beside compute: hops between two nodes, and processor time of the nodes.

`python -m benchmarks.serving.hops` prints these figures alone, to compare two checkouts in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import psutil

from benchmarks.serving.clusters import Cost, Setup, restart_s, serving
from benchmarks.serving.load import decode_rate
from benchmarks.serving.timed_node import Pass
from resplit.cluster.local import Cluster

TOKENS = 256


def hop_figures(models: Path, repeats: int) -> dict[str, float]:
    """One way from the end of a pass on one node to its begin on the other, in ms, with one stream of decode steps.

    Both nodes are real processes with TLS between them, and run halves of the model. A hop includes all hand-overs
    between threads and event loops. Also the processor time of a node for a token, beside that of its compute.
    """
    with serving(Setup(2, "int4"), models) as cluster:
        names = [name for name in cluster.processes if name.startswith("node-")]
        for name in names:
            restart_s(cluster, name, _timed_command(cluster, name))
        decode_rate(cluster.url, 1, new_tokens=16)
        before, begun_s = Cost.of(cluster), time.perf_counter()
        for _ in range(repeats):
            decode_rate(cluster.url, 1, prompt_tokens=8, new_tokens=TOKENS)
        after, ended_s = Cost.of(cluster), time.perf_counter()
        found = {name: _passes(cluster, name) for name in names}
    measured = {name: [p for p in passes if begun_s < p.begin_s < ended_s] for name, passes in found.items()}
    hops_ms = _hops_ms(measured)
    compute_s = sum(each.compute_s for passes in measured.values() for each in passes)
    tokens = repeats * TOKENS
    return {
        "hop_ms_p50": statistics.median(hops_ms),
        "hop_ms_p99": statistics.quantiles(hops_ms, n=100)[-1],
        "node_cpu_ms_per_token": (after.nodes_s - before.nodes_s - compute_s) / len(names) / tokens * 1e3,
    }


def _timed_command(cluster: Cluster, name: str) -> list[str]:
    """The command of a running node, with its passes noted in a file of the state folder."""
    python, _, _, *arguments = psutil.Process(cluster.processes[name].pid).cmdline()
    return [python, "-m", "benchmarks.serving.timed_node", str(_file(cluster, name)), *arguments]


def _passes(cluster: Cluster, name: str) -> list[Pass]:
    """End the node, and read its passes."""
    cluster.processes[name].terminate()
    cluster.processes[name].wait()
    return [Pass(**each) for each in json.loads(_file(cluster, name).read_text(encoding="utf-8"))]


def _file(cluster: Cluster, name: str) -> Path:
    return cluster.state / f"passes-{name}.json"


def _hops_ms(passes: dict[str, list[Pass]]) -> list[float]:
    """The times between passes of one decode step on different nodes."""
    steps: defaultdict[tuple[str, int], list[tuple[Pass, str]]] = defaultdict(list)
    for node, each in passes.items():
        for one in each:
            if one.position:
                steps[one.session, one.position].append((one, node))
    return [
        (later.begin_s - earlier.end_s) * 1e3
        for step in steps.values()
        for (earlier, node), (later, other) in pairwise(sorted(step, key=lambda one: one[0].first))
        if node != other
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="repeats of 256 tokens")
    parser.add_argument("--cache", type=Path, default=Path(".resplit/bench"), help="packaged models")
    options = parser.parse_args()
    models = options.cache / "models"
    models.mkdir(parents=True, exist_ok=True)
    for name, value in hop_figures(models, options.repeats).items():
        print(f"{name:24} {value:.3g}")


if __name__ == "__main__":
    main()
