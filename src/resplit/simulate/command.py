"""`resplit simulate`: read a scenario and its cluster, simulate a policy or all of them, print one JSON object each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from resplit.policies import POLICIES, make_policy
from resplit.process.garbage import rare_collections
from resplit.records import RunRecord
from resplit.simulate.oracle import ORACLE, oracle
from resplit.simulate.result import SimulatedResult
from resplit.simulate.run import Physics, simulate
from resplit.simulate.world import World

__all__ = ["run_oracle", "run_policy", "simulate_command"]

# Ablations of what a cluster does, not only of what is decided.
WITHOUT_KV_TRANSFER, WITHOUT_STANDBY = "resplit-without-kv-transfer", "resplit-without-standby"


def run_policy(world: World, policy: str, seed: int) -> tuple[RunRecord, SimulatedResult]:
    """Simulate one policy; returns the record of the run, and its figures.

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
        return record, SimulatedResult.of(world, record, time.perf_counter() - begun_s)


def run_oracle(world: World, seed: int, rivals: Sequence[RunRecord]) -> tuple[RunRecord, SimulatedResult]:
    """The oracle's run beside those of the `rivals`, and its figures."""
    begun_s = time.perf_counter()
    record = oracle(world, seed, rivals)
    return record, SimulatedResult.of(world, record, time.perf_counter() - begun_s)


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
        typer.echo(json.dumps(found.to_json()))
