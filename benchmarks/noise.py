"""What noise costs: the home cluster in the simulator, under measured background load and bandwidth.

    python -m benchmarks.noise --background node_bitbrains_week.csv.gz --bandwidth net_ghent_4g_lte.csv.gz

Every node has the background load of a machine of the first file, drawn by the seed, from a moment drawn by the seed;
the links to "cloud" together have the bandwidth of a trace of the second file. Prints a line for each seed, then the
means with 95 % intervals of the difference from static, paired by seed, and of the moves. data/traces/README.md says
where such files come from.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from resplit.config import ClusterConfig, load_cluster
from resplit.intervals import interval
from resplit.scenario import BackgroundTrace, BandwidthTrace, ScenarioConfig
from resplit.simulate.command import run_policy
from resplit.simulate.models import load_model
from resplit.simulate.world import World
from resplit.traces import with_traces

HOME = Path("data/clusters/home.yaml")
MODEL = Path("data/models/SmolLM2-135M-Instruct-int4.yaml")
FAR = "cloud"


@dataclass(frozen=True)
class Compared:
    """Static and adaptive with one seed: mean latencies in seconds, and the moves of the adaptive run."""

    seed: int
    static_s: float
    adaptive_s: float
    moves: int

    def row(self) -> str:
        """The runs as a line of a table."""
        return f"| {self.seed} | {self.static_s:.3f} | {self.adaptive_s:.3f} | {self.moves} |"


def scenario(
    cluster: ClusterConfig, background: Path, bandwidth: Path, duration_s: float, speed: float, seed: int
) -> ScenarioConfig:
    """The noise of one seed. `speed` is that of the background, which changes every five minutes."""
    rng = np.random.default_rng(seed)
    machines, links = _lengths_s(background, "vm"), _lengths_s(bandwidth, "trace_id")
    backgrounds = []
    for node in cluster.nodes:
        machine, shift_s = _drawn(machines, duration_s * speed, rng)
        backgrounds.append(
            BackgroundTrace.model_validate(
                {"kind": "background", "file": str(background), "vm": machine}
                | {"node": node.name, "shift": f"{shift_s} s", "speed": speed}
            )
        )
    link, shift_s = _drawn(links, duration_s, rng)
    bandwidths = [
        BandwidthTrace.model_validate(
            {"kind": "bandwidth", "file": str(bandwidth), "trace_id": link}
            | {"between": (node.name, FAR), "shift": f"{shift_s} s"}
        )
        for node in cluster.nodes
        if node.name != FAR
    ]
    return ScenarioConfig.model_construct(name="noise", duration=duration_s, traces=(*backgrounds, *bandwidths))


def compared(cluster: ClusterConfig, noise: ScenarioConfig, seed: int) -> Compared:
    """Simulate static and adaptive under the same noise and requests."""
    world = World(cluster, load_model(MODEL, cluster.private_layers), with_traces(noise, Path()))
    static, adaptive = (run_policy(world, policy, seed)[1].metrics for policy in ("static", "resplit"))
    return Compared(seed, static.latency_mean_s, adaptive.latency_mean_s, adaptive.reconfigurations)


def summary(runs: list[Compared]) -> str:
    """The difference of the latencies, paired by seed, and the moves, with their intervals."""
    difference = interval([run.adaptive_s - run.static_s for run in runs])
    moves = interval([float(run.moves) for run in runs])
    return (
        f"adaptive less static: {difference[0]:+.3f} s, 95 % interval of {difference[1]:.3f} s to each side; "
        f"moves: {moves[0]:.1f}, interval {moves[1]:.1f}"
    )


def _lengths_s(path: Path, column: str) -> dict[str, float]:
    """How long each trace of a file is."""
    rows = pd.read_csv(path, dtype={column: str})
    return {str(name): float(seconds) for name, seconds in rows.groupby(column).time_s.max().items()}


def _drawn(lengths_s: dict[str, float], needed_s: float, rng: np.random.Generator) -> tuple[str, float]:
    """A trace that is long enough, and a moment of it after which enough of it is left."""
    names = sorted(name for name, seconds in lengths_s.items() if seconds >= needed_s)
    name = names[int(rng.integers(len(names)))]
    return name, float(rng.uniform(0.0, lengths_s[name] - needed_s))


def main() -> None:
    """Simulate all seeds and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--background", type=Path, required=True)
    parser.add_argument("--bandwidth", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--speed", type=float, default=10.0, help="of the background: 10 plays an hour in six minutes")
    given = parser.parse_args()
    cluster, runs = load_cluster(HOME), []
    sys.stdout.write("| seed | static, s | adaptive, s | moves |\n| --- | --- | --- | --- |\n")
    for seed in range(given.seeds):
        noise = scenario(cluster, given.background, given.bandwidth, given.seconds, given.speed, seed)
        runs.append(compared(cluster, noise, seed))
        sys.stdout.write(f"{runs[-1].row()}\n")
        sys.stdout.flush()
    sys.stdout.write(f"\n{summary(runs)}\n")


if __name__ == "__main__":
    main()
