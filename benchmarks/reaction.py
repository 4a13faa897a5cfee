"""How fast a cluster reacts to a change: from the first token that the change touched to noticed and to live.

Starts the emulated home cluster, keeps streams busy and changes one thing at a time: other load on a node, a node that
throttles, a link that degrades, and the end of each. Only the fast loop decides. Prints the tables of docs/reaction.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import first_plan
from resplit.cluster.local import Cluster, running
from resplit.decide import Settings
from resplit.types import segments_of

MODEL = "SmolLM2-135M-Instruct"
NEW_TOKENS = 8
PROMPT = list(range(100, 124))
SETTLE_S = 4.0
WITHIN_S = 8.0
FAR = {"latency_s": 0.12, "bandwidth_bytes_per_s": 1.25e6}


@dataclass(frozen=True)
class TimedChange:
    """A change in words, how to make it, and whether it is the end of another one."""

    words: str
    make: Callable[[], None]
    is_end: bool


@dataclass(frozen=True)
class MeasuredReaction:
    """What came of a change: seconds after the first token that it touched; NaN for what did not happen."""

    change: TimedChange
    noticed_s: float
    live_s: float
    action: str
    seen: str

    def row(self) -> str:
        """The reaction as a line of a table."""
        cells = (self.change.words, self.seen, _text(self.noticed_s), self.action, _text(self.live_s))
        return "| " + " | ".join(cells) + " |"


async def streams(url: str, count: int, stop: asyncio.Event, tokens_s: list[float]) -> None:
    """Keep `count` requests running until `stop`. Appends the times of tokens (seconds since 1970) to `tokens_s`."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "stream": True, "ignore_eos": True}

    def note() -> None:
        tokens_s.append(time.time())

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            while not stop.is_set():
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            note()

    await asyncio.gather(*(one() for _ in range(count)))


def changes(client: ControlClient, kind: str) -> tuple[TimedChange, TimedChange]:
    """A change of this kind at the node with most blocks, or at the link that follows it; and its end."""
    placement = client.model().placement or ()
    node = Counter(placement).most_common(1)[0][0]
    if kind == "link":
        cluster, stops = client.cluster(), [segment.node for segment in segments_of(placement)]
        stops = [cluster.source, *stops, cluster.source]
        pairs = [(one, other) for one, other in itertools.pairwise(stops) if one != other]
        one, other = next((pair for pair in pairs if node in pair), pairs[0])
        shape = cluster.link(one, other)
        assert shape is not None, "the home cluster declares all links"
        near = {"latency_s": shape.latency, "bandwidth_bytes_per_s": shape.bandwidth}
        words = f"{one} - {other}: 120 ms, 10 Mbit/s"
        return _pair(
            words, lambda: client.emulate_link(one, other, **FAR), lambda: client.emulate_link(one, other, **near)
        )
    value, otherwise = (0.8, 0.0) if kind == "background_utilization" else (5.0, 1.0)
    words = f"{node}: others use 80 %" if kind == "background_utilization" else f"{node}: 5 times slower"
    return _pair(
        words,
        lambda: client.emulate_node(node, **{kind: value}),
        lambda: client.emulate_node(node, **{kind: otherwise}),
    )


def _pair(words: str, begin: Callable[[], None], end: Callable[[], None]) -> tuple[TimedChange, TimedChange]:
    return TimedChange(words, begin, is_end=False), TimedChange(f"end of {words}", end, is_end=True)


async def react(client: ControlClient, change: TimedChange, tokens_s: Sequence[float]) -> MeasuredReaction:
    """Make a change, and wait for what follows from it."""
    logged, epoch, at_s = client.last_decision(), client.model().epoch, time.time()
    await asyncio.to_thread(change.make)
    # The epoch is another process's: there is no event to wait for.
    while client.model().epoch == epoch and time.time() < at_s + WITHIN_S:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    first = next((decision for decision in client.decisions(logged) if decision.seen), None)
    live_s = next((each.committed_s for each in client.epochs() if each.epoch > epoch), math.nan)
    touched_s = next((token_s for token_s in tokens_s if token_s > at_s), math.nan)
    if first is None:
        return MeasuredReaction(change, math.nan, math.nan, "-", "-")
    return MeasuredReaction(change, first.at_s - touched_s, live_s - touched_s, first.action, "; ".join(first.seen))


async def measure(cluster: Cluster, client: ControlClient, count: int, rounds: int) -> list[MeasuredReaction]:
    """All reactions of `rounds` rounds of changes under `count` streams."""
    stop, tokens_s, reactions = asyncio.Event(), list[float](), list[MeasuredReaction]()
    load = asyncio.create_task(streams(cluster.url, count, stop, tokens_s))
    client.arm_fast_loop(Settings(horizon_s=60.0, trial_s=30.0), 3600.0)
    for _ in range(rounds):
        for kind in ("background_utilization", "slowdown", "link"):
            await asyncio.sleep(SETTLE_S)
            for change in changes(client, kind):
                reactions.append(await react(client, change, tokens_s))
                print(reactions[-1].row(), flush=True)
                await asyncio.sleep(SETTLE_S)
    stop.set()
    await load
    return reactions


def summary(name: str, reactions: Sequence[MeasuredReaction]) -> str:
    """Median and longest times of these reactions."""
    times = {"noticed": [each.noticed_s for each in reactions], "live": [each.live_s for each in reactions]}
    lines = []
    for word, values in times.items():
        known = sorted(value for value in values if not math.isnan(value))
        if known:
            median, longest = statistics.median(known), known[-1]
            lines.append(
                f"{name}, {word}: median {median:.2f} s, longest {longest:.2f} s ({len(known)} of {len(values)})"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", type=Path, default=Path("data/clusters/home.yaml"))
    parser.add_argument("--state", type=Path, default=Path(".resplit/reaction"))
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    with running(given.cluster, given.state, MODEL) as cluster, ControlClient(cluster.url, cluster.token) as client:
        print(f"first placement: {first_plan(cluster)}\n")
        print("| change | seen | noticed, s | action | live, s |\n| --- | --- | --- | --- | --- |")
        reactions = asyncio.run(measure(cluster, client, given.streams, given.rounds))
    print()
    print(summary("changes", [each for each in reactions if not each.change.is_end]))
    print(summary("ends of changes", [each for each in reactions if each.change.is_end]))


def _text(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds:.2f}"


if __name__ == "__main__":
    main()
