"""The noise of `benchmarks.noise`, from trace files of the shape of public ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.noise import FAR, HOME, Compared, scenario, summary
from resplit.config import load_cluster
from resplit.traces import with_traces

DURATION_S, SPEED = 60.0, 10.0


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Background of two machines, one of them too short, and the bandwidth of a link."""
    background, bandwidth = tmp_path / "background.csv", tmp_path / "bandwidth.csv"
    rows = [("7", 300.0 * index, 0.1 * (index % 5)) for index in range(10)] + [("8", 0.0, 0.9), ("8", 300.0, 0.9)]
    pd.DataFrame(rows, columns=["vm", "time_s", "cpu_utilization"]).to_csv(background, index=False)
    links = [("bus", float(second), 1e7 + 1e5 * second) for second in range(200)]
    pd.DataFrame(links, columns=["trace_id", "time_s", "throughput_bps"]).to_csv(bandwidth, index=False)
    return background, bandwidth


def test_every_node_has_background_and_every_far_link_the_same_bandwidth(files: tuple[Path, Path]) -> None:
    cluster = load_cluster(HOME)
    noise = with_traces(scenario(cluster, *files, DURATION_S, SPEED, seed=1), Path())
    assert {change.node for change in noise.nodes} == set(cluster.node_names)
    assert {change.label for change in noise.nodes} == {"vm 7"}
    assert {change.between for change in noise.links} == {(name, FAR) for name in cluster.node_names if name != FAR}
    by_moment = pd.DataFrame([(change.at, change.bandwidth) for change in noise.links], columns=["at", "bandwidth"])
    assert (by_moment.groupby("at").bandwidth.nunique() == 1).all()
    assert max(change.at for change in (*noise.nodes, *noise.links)) < DURATION_S


def test_a_seed_draws_the_same_noise_again_and_another_one_other_noise(files: tuple[Path, Path]) -> None:
    cluster = load_cluster(HOME)
    one, again, other = (scenario(cluster, *files, DURATION_S, SPEED, seed) for seed in (1, 1, 2))
    assert one.traces == again.traces
    assert one.traces != other.traces


def test_differences_are_paired_by_seed() -> None:
    runs = [Compared(0, 1.0, 1.1, 2), Compared(1, 2.0, 2.1, 2)]
    assert summary(runs).startswith("adaptive less static: +0.100 s, 95 % interval of 0.000 s")
    assert summary(runs).endswith("moves: 2.0, interval 0.0")
