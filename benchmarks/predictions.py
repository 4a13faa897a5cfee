"""How far off the predicted latency of requests is: one, four and twelve streams on the emulated home cluster.

Each stream sends one request after another. Prints a table like the one in docs/planner.md. On a machine that is too
busy to emulate the nodes, passes take longer than declared, and that adds to the error; `--slower` makes it small.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import yaml

from benchmarks.serving.load import Timed, stream
from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import describe, proposal_of
from resplit.cluster.local import Cluster, running
from resplit.control.planning import without
from resplit.cost import fit_cost_model, node_readings, problem_from
from resplit.planner.best_effort import solve_best_effort
from resplit.planner.closed_loop import with_streams
from resplit.planner.evaluate import evaluate
from resplit.types import Problem, RequestClass

MODEL = "SmolLM2-135M-Instruct"
WARM_REQUESTS = 1  # of each stream, which are not counted
COLUMNS = (
    "placement", "streams", "predicted", "in turns", "measured", "error", "within target", "first token", "gap",
    "requests",
)  # fmt: skip
TARGETS = {1: 0.10, 4: 0.20, 12: 0.20}  # largest relative error by number of streams


@dataclass(frozen=True)
class PredictionRow:
    """One configuration: its placement, the streams, and the mean latency of a request.

    `turns_s` is predicted as if sessions shared no passes.
    """

    placement: str
    streams: int
    predicted_s: float
    compute_s: float
    queueing_s: float
    network_s: float
    turns_s: float
    measured_s: float
    first_token_s: float
    gap_s: float
    requests: int

    @property
    def error(self) -> float:
        """Relative error of the prediction; positive where it is too high."""
        return self.predicted_s / self.measured_s - 1


async def closed_loop(url: str, streams: int, prompt_tokens: int, new_tokens: int, for_s: float) -> list[Timed]:
    """The requests of `streams` streams that began and ended within `for_s` seconds, after the first ones."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        until_s = time.monotonic() + for_s

        async def one(number: int) -> list[Timed]:
            timed: list[Timed] = []
            while len(timed) <= WARM_REQUESTS or time.monotonic() < until_s:
                prompt = [
                    (7919 * number + 31 * len(timed) + 17 * position) % 40_000 for position in range(prompt_tokens)
                ]
                timed.append(await stream(client, prompt, new_tokens))
            return timed

        each = await asyncio.gather(*(one(number) for number in range(streams)))
    last_s = min(timed[-1].begun_s for timed in each)  # all streams are busy until then
    return [request for timed in each for request in timed[WARM_REQUESTS:] if request.begun_s <= last_s]


def measure(cluster: Cluster, streams: Sequence[int], for_s: float, slower: float) -> list[PredictionRow]:
    """Profile the cluster, and compare prediction and measurement for two placements and each number of streams."""
    config, rows = cluster.config, []
    first = config.classes[0]
    demand = RequestClass(first.name, config.source, first.rate_rps, first.prompt_tokens, first.new_tokens)
    with ControlClient(cluster.url, cluster.token) as client:
        for node in config.node_names:
            client.emulate_node(node, slowdown=slower)
        client.profile()
        telemetry, features = client.telemetry(0.0), client.model().features
        problem = problem_from(
            fit_cost_model(telemetry, features), features, config, node_readings(telemetry.nodes), [demand]
        )
        best = solve_best_effort(problem)
        assert best.plan.placement is not None
        busiest = max(set(best.plan.placement) - {config.source}, key=best.plan.placement.count)
        for plan in (best, solve_best_effort(without(problem, [busiest]))):
            assert plan.plan.placement is not None
            client.propose(proposal_of(plan, "initial", client.model().epoch))
            placement = plan.plan.placement
            for number in streams:
                requests = asyncio.run(
                    closed_loop(cluster.url, number, int(first.prompt_tokens), int(first.new_tokens), for_s)
                )
                row = _row(problem, placement, number, requests)
                rows.append(replace(row, placement=describe(placement, features)))
                print(_text(rows[-1]), flush=True)
        print("\nEmulated passes took longer than declared by (median):", _emulation_errors(client))
    return rows


def _row(problem: Problem, placement: tuple[str, ...], streams: int, requests: list[Timed]) -> PredictionRow:
    predicted = evaluate(with_streams(problem, placement, streams), placement)
    in_turns = replace(problem, nodes=tuple(replace(node, load_share=1.0) for node in problem.nodes))
    return PredictionRow(
        placement="",
        streams=streams,
        predicted_s=predicted.terms.latency_s,
        compute_s=float(predicted.compute_s[0]),
        queueing_s=float(predicted.queueing_s[0]),
        network_s=float(predicted.network_s[0]),
        turns_s=evaluate(with_streams(in_turns, placement, streams), placement).terms.latency_s,
        measured_s=statistics.fmean(each.times_s[-1] - each.begun_s for each in requests),
        first_token_s=statistics.fmean(each.first_token_s for each in requests),
        gap_s=statistics.fmean(gap for each in requests for gap in each.gaps_s),
        requests=len(requests),
    )


def _emulation_errors(client: ControlClient) -> str:
    errors = {node.node: node.emulation_error for node in client.status().nodes if node.blocks}
    return ", ".join(f"{name} {error:.1%}" for name, error in errors.items() if error is not None)


def _text(row: PredictionRow) -> str:
    parts = " + ".join(f"{1e3 * s:.0f}" for s in (row.compute_s, row.queueing_s, row.network_s))
    cells = [
        row.placement,
        str(row.streams),
        f"{1e3 * row.predicted_s:.0f} = {parts}",
        f"{1e3 * row.turns_s:.0f}",
        f"{1e3 * row.measured_s:.0f}",
        f"{row.error:+.1%}",
        "yes" if abs(row.error) <= TARGETS.get(row.streams, max(TARGETS.values())) else "no",
        f"{1e3 * row.first_token_s:.0f}",
        f"{1e3 * row.gap_s:.1f}",
        str(row.requests),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", type=Path, default=Path("data/clusters/home.yaml"))
    parser.add_argument("--state", type=Path, default=Path(".resplit/predictions"))
    parser.add_argument("--streams", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each configuration (default: %(default)s)")
    parser.add_argument("--slower", type=float, default=1.0, help="emulated nodes are slower by this factor")
    given = parser.parse_args()
    print(f"load average at the start: {os.getloadavg()[0]:.1f}")
    print("Times in ms; predicted = compute + queueing + network.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        # The cost model predicts passes without drafts.
        content = yaml.safe_load(given.cluster.read_text())
        content["limits"] = content.get("limits", {}) | {"drafts": 0}
        without_drafts = Path(folder) / "cluster.yaml"
        without_drafts.write_text(yaml.safe_dump(content))
        with running(without_drafts, given.state, MODEL) as cluster:
            measure(cluster, given.streams, given.seconds, given.slower)
    print(f"\nload average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
