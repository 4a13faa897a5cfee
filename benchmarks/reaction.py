"""How fast a cluster reacts to a change: from the end of the first pass that the change touched to noticed and live.

Starts the emulated home cluster with streams that never end, and changes one thing at a time: other load on a node,
its end, a node that throttles, its end. Only the fast loop decides. Prints a table like the one in docs/reaction.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx

from resplit.cluster.client import ControlClient
from resplit.cluster.local import running
from resplit.cluster.state import first_plan
from resplit.decide import Settings
from tests.support.processes import poll_until

MODEL = "SmolLM2-135M-Instruct"
NEW_TOKENS = 8
PROMPT = list(range(100, 124))
SETTLE_S = 4.0
WITHIN_S = 8.0


@dataclass(frozen=True)
class Reaction:
    """One change: its time and what came of it, in seconds since 1970; None for what did not happen."""

    change: str
    at_s: float
    touched_s: float | None
    decided_s: float | None
    live_s: float | None
    action: str

    def after_touched(self, moment_s: float | None) -> str:
        """Seconds from the end of the first pass touched to a moment, as text."""
        return "-" if moment_s is None or self.touched_s is None else f"{moment_s - self.touched_s:.2f}"


async def streams(url: str, count: int, stop: asyncio.Event, ends_s: list[float]) -> None:
    """Keep `count` requests running until `stop`. Appends the times of tokens (seconds since 1970) to `ends_s`."""

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            while not stop.is_set():
                body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "stream": True, "ignore_eos": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    ends_s.extend([time.time() async for line in response.aiter_lines() if line.startswith("data: {")])

    await asyncio.gather(*(one() for _ in range(count)))


async def react(client: ControlClient, change: str, body: dict[str, object], ends_s: list[float]) -> Reaction:
    """Make a change and wait for the epoch that follows from it."""
    before, epoch = len(client.decisions()), client.model().epoch
    at_s = time.time()
    await asyncio.to_thread(client.emulate_node, body)
    await poll_until(lambda: client.model().epoch > epoch or time.time() > at_s + WITHIN_S, timeout_s=2 * WITHIN_S)
    decisions = [entry.body for entry in client.decisions()][before:]
    live = [each for each in client.epochs() if each.epoch > epoch]
    # A pass that runs at the moment of the change ends as it began: the second token after it is the first touched.
    touched = [end_s for end_s in list(ends_s) if end_s > at_s]
    first = decisions[0] if decisions else None
    return Reaction(
        change,
        at_s,
        touched[0] if touched else None,
        first["at_s"] if first else None,
        live[0].committed_s if live else None,
        first["action"] if first else "nothing",
    )


async def measure(client: ControlClient, url: str, count: int, rounds: int) -> list[Reaction]:
    """All reactions of `rounds` rounds of changes under `count` streams."""
    stop, ends_s, reactions = asyncio.Event(), list[float](), list[Reaction]()
    load = asyncio.create_task(streams(url, count, stop, ends_s))
    client.arm_fast_loop(Settings(horizon_s=60.0, trial_s=30.0), 3600.0)
    for _ in range(rounds):
        for share, slowdown in ((0.8, None), (0.0, None), (None, 5.0), (None, 1.0)):
            await asyncio.sleep(SETTLE_S)
            placement = client.model().placement or ()
            changed = reactions[-1].change.split()[0] if reactions else ""
            node = changed if share == 0.0 or slowdown == 1.0 else Counter(placement).most_common(1)[0][0]
            body = {"node": node, "background_utilization": share, "slowdown": slowdown}
            what = f"background {share}" if share is not None else f"slowdown {slowdown}"
            reactions.append(await react(client, f"{node} {what}", body, ends_s))
            each = reactions[-1]
            print(
                f"| {each.change} | {each.action} | {each.after_touched(each.decided_s)} | "
                f"{each.after_touched(each.live_s)} |",
                flush=True,
            )
    stop.set()
    await load
    return reactions


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", type=Path, default=Path("data/clusters/home.yaml"))
    parser.add_argument("--state", type=Path, default=Path(".resplit/reaction"))
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    with running(given.cluster, given.state, MODEL) as cluster, ControlClient(cluster.url, cluster.token) as client:
        print(first_plan(cluster))
        print("| change | action | noticed, s | live, s |\n| --- | --- | --- | --- |")
        reactions = asyncio.run(measure(client, cluster.url, given.streams, given.rounds))
    noticed = [r.decided_s - r.touched_s for r in reactions if r.decided_s and r.touched_s]
    live = [r.live_s - r.touched_s for r in reactions if r.live_s and r.touched_s]
    for name, values in (("noticed", noticed), ("live", live)):
        if values:
            print(f"{name}: median {statistics.median(values):.2f} s, longest {max(values):.2f} s of {len(values)}")


if __name__ == "__main__":
    main()
