"""How long a session without any cache takes to repeat its passes: one by one, and all decode steps in one pass.

`python -m benchmarks.stepwise_replay` runs three nodes in this process, with emulated links, and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path

from benchmarks.serving.clusters import MODEL
from resplit.config import ClusterConfig
from resplit.gateway.sessions import session as sessions
from resplit.model.source import StoredModel, obtain
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import generate, generation_request

NAMES = ("alpha", "beta", "gamma")
TOGETHER = sessions._REPLAY_POSITIONS


def cluster_of(latency_ms: float) -> ClusterConfig:
    """Three nodes whose links have this latency. There are no replicas."""
    return ClusterConfig.model_validate(
        {
            "name": "replay",
            "source": "alpha",
            "trusted": NAMES,
            "nodes": [{"name": name, "memory": "3 GiB"} for name in NAMES],
            "links": {"default": {"latency": f"{latency_ms} ms", "bandwidth": "1 Gbit/s"}},
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "limits": {"context_tokens": 1024, "copy_every": 0, "deadline": "600 s"},
            "kv_tokens": 2048,
        }
    )


async def replay_s(nodes: InProcessCluster, history: int, positions: int) -> float:
    """Seconds to repeat `history` positions, at most `positions` decode steps in a pass."""
    sessions._REPLAY_POSITIONS = positions
    request = generation_request(history, prompt=(5, 17, 40, 200, 31, 8, 99, 7))
    running = asyncio.create_task(generate(nodes.sessions, request))

    async def grown() -> bool:
        return any(each.position >= history for each in nodes.sessions._live.values())

    await until(grown, 600)
    next(iter(nodes.sessions._live.values())).lose("to measure its replay")
    await running
    (move,) = nodes.sessions.records(0)[-1].moves
    assert move.recovery is not None
    return move.recovery.replay_s


async def rows(model: StoredModel, latency_ms: float, histories: list[int], repeats: int) -> None:
    """Measure both ways in turns, and print one row for each length of the history."""
    with tempfile.TemporaryDirectory() as folder:
        async with in_process(cluster_of(latency_ms), model, Path(folder)) as nodes:
            controller = nodes.controller()
            await controller.membership.introduce()
            blocks = len(nodes.features)
            await deploy(controller, [*(NAMES[block * 3 // blocks] for block in range(blocks - 1)), "alpha"])
            for history in histories:
                times = [[await replay_s(nodes, history, n) for n in (1, TOGETHER)] for _ in range(repeats)]
                single, together = map(statistics.median, zip(*times, strict=True))
                row = (
                    model.spec.weights,
                    latency_ms,
                    history,
                    f"{single:.2f}",
                    f"{together:.2f}",
                    f"{single / together:.1f}",
                )
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
            await controller.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stepwise_replay", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"))
    parser.add_argument("--weights", nargs="+", default=["int4", "float32"])
    parser.add_argument("--latencies-ms", type=float, nargs="+", default=[2, 20])
    parser.add_argument("--histories", type=int, nargs="+", default=[16, 64, 192])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    sessions._RESTORE_TRIES = 0  # restore nothing: every pass is repeated
    print("| weights | latency, ms | history | one by one, s | together, s | ratio |\n|" + " --- |" * 6)
    for weights in given.weights:
        model = obtain(MODEL, given.models, weights)
        for latency_ms in given.latencies_ms:
            asyncio.run(rows(model, latency_ms, given.histories, given.repeats))


if __name__ == "__main__":
    main()
