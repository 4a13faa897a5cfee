"""All cores are busy with passes, requests and planning. No node that is merely slow may be declared lost."""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path

import numpy as np

from benchmarks.chaos.findings import Finding, stream_findings
from resplit.cluster.client import ControlClient
from resplit.planner import solve
from resplit.problem import read_problem
from tests.support.cluster import load_unsplit, make_model, started
from tests.support.processes import log_lines
from tests.support.streams import expected_tokens, streaming

SECONDS = 600.0
NEW_TOKENS = 160


async def run(scale: float, folder: Path) -> list[Finding]:
    """Ten minutes of eight streams at full speed, beside a process that plans continuously."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    seconds = max(5.0, SECONDS * scale)
    with started(folder, model) as cluster, ControlClient(cluster.url, cluster.token) as client:
        latest_problem = cluster.state / "latest_problem.json"
        planning = multiprocessing.get_context("spawn").Process(
            target=plan_without_end, args=(latest_problem,), daemon=True
        )
        planning.start()
        try:
            async with streaming(cluster, expected) as streams:
                await asyncio.sleep(seconds)
        finally:
            planning.kill()
            planning.join()
        alarms = log_lines(cluster, "a node is silent") + log_lines(cluster, "a node is lost")
        recoveries = [decision for decision in client.decisions() if decision.action == "recover"]
    false = len(alarms)
    return [
        *stream_findings("false_positives", streams),
        Finding(
            "false_positives",
            f"nodes wrongly reported as silent or lost in {seconds:.0f} s of full load",
            str(false),
            "0",
            met=false == 0,
        ),
        Finding("false_positives", "recoveries that this caused", str(len(recoveries)), "0", met=not recoveries),
        Finding("false_positives", "tokens served per second", f"{NEW_TOKENS * streams.right / seconds:.0f}"),
    ]


def plan_without_end(latest_problem: Path) -> None:
    """Keep a core busy: solve the cluster's own placement problem again and again."""
    problem = read_problem(latest_problem)
    rng = np.random.default_rng(3)
    while True:
        problem.decode_s_per_token[:] *= rng.uniform(0.95, 1.05, problem.decode_s_per_token.shape)
        solve(problem, time_limit_s=2.0)
