"""`resplit simulate`: read a scenario and its cluster, simulate a policy or all of them, print one JSON object each."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from resplit.metrics import energy_j_per_request, summarise
from resplit.policies import POLICIES, make_policy
from resplit.process.garbage import rare_collections
from resplit.records import RunRecord
from resplit.simulate.oracle import ORACLE, oracle
from resplit.simulate.run import Physics, simulate
from resplit.simulate.world import World

__all__ = ["described", "run_oracle", "run_policy", "simulate_command"]

# Ablations of what a cluster does, not only of what is decided.
WITHOUT_KV_TRANSFER, WITHOUT_STANDBY = "resplit-without-kv-transfer", "resplit-without-standby"


def run_policy(world: World, policy: str, seed: int) -> tuple[RunRecord, dict[str, Any]]:
    """Simulate one policy; returns the record of the run, and the JSON object about it.

    `oracle` simulates all of `POLICIES` first, because it takes what is best of them.
    """
    if policy == ORACLE:
        return run_oracle(world, seed, [run_policy(world, name, seed)[0] for name in POLICIES])
    begun_s = time.perf_counter()
    record = simulate(
        world.cluster,
        world.features,
        world.scenario,
        world.arrivals(seed),
        make_policy(policy),
        name=policy,
        seed=seed,
        loop=replace(world.loop(), prepares=policy != WITHOUT_STANDBY),
        physics=Physics(kv_transfer=policy != WITHOUT_KV_TRANSFER),
    )
    with rare_collections():  # the run has just become garbage, and takes long to collect
        return record, described(world, record, time.perf_counter() - begun_s)


def run_oracle(world: World, seed: int, rivals: Sequence[RunRecord]) -> tuple[RunRecord, dict[str, Any]]:
    """The oracle's run beside those of the `rivals`, and the JSON object about it."""
    begun_s = time.perf_counter()
    record = oracle(world, seed, rivals)
    return record, described(world, record, time.perf_counter() - begun_s)


def described(world: World, record: RunRecord, wall_s: float) -> dict[str, Any]:
    """The JSON object about a run. `wall_s` is what it took."""
    power_w = {node.name: node.compute_w for node in world.cluster.nodes}
    found: dict[str, Any] = {
        "policy": record.policy,
        "scenario": world.scenario.name,
        "seed": record.seed,
        "simulated_s": world.scenario.duration,
        "wall_s": round(wall_s, 3),
        "energy_j_per_request": energy_j_per_request(record, power_w),
        **asdict(summarise(record)),
    }
    return {name: _plain(value) for name, value in found.items()}


def simulate_command(
    scenario: Path,
    policy: str,
    seed: int,
    out: Path | None = None,
    cluster: Path | None = None,
    model: Path | None = None,
    rivals: Sequence[Path] = (),
    traces: Path | None = None,
) -> None:
    """Print one JSON object per policy on standard output, and save the tables of each run below `out`.

    A policy of one's own is looked for in the working directory too. `rivals` are folders with the tables of other
    policies' runs of this scenario and seed: the oracle then compares them, and runs nobody.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    world = World.load(scenario, cluster, model, traces)
    records = [RunRecord.load(folder) for folder in rivals]
    for name in (*POLICIES, ORACLE) if policy == "all" else (policy,):
        beside = name == ORACLE and records
        record, found = run_oracle(world, seed, records) if beside else run_policy(world, name, seed)
        records.append(record)
        if out is not None:
            record.save(out / name.replace(":", ".") if policy == "all" else out)
        typer.echo(json.dumps(found))


def _plain(value: Any) -> Any:
    """A value of the JSON object: rounded as in reports/metrics.json, null for NaN."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
