"""`python -m benchmarks.serving.turns OLD NEW`: what the path of a token costs in two checkouts, measured in turns.

Each checkout runs two nodes and a gateway with the tiny model of the tests, so that the path dominates. 8 streams
decode in one and then in the other one, several times. The table has tokens/s, and the processor time of the event
loop of each process for a token; the ratios are medians of new over old.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.epochs import Proposal

_STREAMS, _TOKENS = 8, 160
_CLUSTER = """
name: turns
source: alpha
trusted: [alpha, beta]
nodes:
  - {{name: alpha, memory: 64 MiB, max_utilization: 0.999}}
  - {{name: beta, memory: 64 MiB, max_utilization: 0.999}}
classes: [{{name: chat, rate_rps: 0.5, prompt_tokens: 4, new_tokens: 40}}]
limits: {{context_tokens: 500, sessions: 16, queue: 8, deadline: 600 s, copy_every: {copy_every}, drafts: 0}}
kv_tokens: 16000
"""

Figures = dict[str, float]


def loop_s(pid: int) -> float:
    """Processor seconds of a process's first thread, which runs its event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


async def decode(url: str) -> None:
    """Stream all answers to their ends."""

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "tiny-llama", "prompt": [10 + number, 11, 12, 13], "max_tokens": _TOKENS, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as response:
            assert response.status_code == 200, await response.aread()
            async for _ in response.aiter_raw():
                pass

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await asyncio.gather(*(stream(client, number) for number in range(_STREAMS)))


def measured(cluster: Cluster) -> Figures:
    """Tokens/s, and milliseconds of each event loop for a token."""
    pids = {name: process.pid for name, process in cluster.processes.items()}
    before, begun_s = {name: loop_s(pid) for name, pid in pids.items()}, time.monotonic()
    asyncio.run(decode(cluster.url))
    took_s, tokens = time.monotonic() - begun_s, _STREAMS * _TOKENS
    loops = {f"{name}, ms": (loop_s(pid) - before[name]) / tokens * 1e3 for name, pid in pids.items()}
    return {"tokens/s": tokens / took_s, **loops}


def serve_turns(copy_every: int) -> None:
    """Run a cluster of this checkout, and measure at each line of the standard input."""
    from tests.support.cluster import make_model, started  # of this checkout

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryDirectory(prefix="resplit-turns-") as folder, contextlib.redirect_stdout(sys.stderr):
        model = make_model(Path(folder))
        with started(Path(folder), model, _CLUSTER.format(copy_every=copy_every), plan=False) as cluster:
            with ControlClient(cluster.url, cluster.token) as client:
                live = client.model()
                half = len(live.features) // 2
                middle = ["alpha"] * half + ["beta"] * (len(live.features) - half - 1)
                client.propose(Proposal((*middle, "alpha"), "initial", live.epoch))
            for _ in sys.stdin:
                print(json.dumps(measured(cluster)), file=answers)


class Side:
    """A checkout whose cluster runs."""

    def __init__(self, checkout: Path, copy_every: int) -> None:
        paths = os.pathsep.join([str(checkout / "src"), str(checkout)])
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--serve", "--copy-every", str(copy_every)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=checkout, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip

    def turn(self) -> Figures:
        """Measure once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: Figures = json.loads(self._process.stdout.readline())
        return found

    def stop(self) -> None:
        """End the cluster."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(sides: Sequence[Side], turns: int) -> None:
    """Measure in turns, and print a row for each figure."""
    for side in sides:
        side.turn()  # the first passes of a process are slower
    found = [[side.turn() for side in (sides if turn % 2 else sides[::-1])] for turn in range(turns)]
    pairs = [tuple(each if turn % 2 else each[::-1]) for turn, each in enumerate(found)]
    print("| | old | new | new over old |\n| --- | --- | --- | --- |")
    for name in pairs[0][0]:
        ratios = [new[name] / old[name] for old, new in pairs]
        olds, news = (statistics.median(pair[side][name] for pair in pairs) for side in (0, 1))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | {olds:.3g} | {news:.3g} | {statistics.median(ratios):.2f} ({spread}) |")


def main() -> None:
    """Compare two checkouts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.turns", description=__doc__)
    parser.add_argument("checkouts", type=Path, nargs="*", metavar="OLD NEW")
    parser.add_argument("--copy-every", type=int, default=16, help="positions in a copy of a cache; 0: no copies")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_turns(given.copy_every)
        return
    if len(given.checkouts) != 2:
        parser.error("two checkouts are needed")
    sides = [Side(checkout.resolve(), given.copy_every) for checkout in given.checkouts]
    try:
        compare(sides, given.turns)
    finally:
        for side in sides:
            side.stop()


if __name__ == "__main__":
    main()
