"""What speculation gains over far links: `python -m benchmarks.serving.speculation` prints a table.

Two clusters run side by side, with drafts and without, and take the same requests in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from dataclasses import replace
from pathlib import Path

import httpx

from benchmarks.serving.clusters import Setup, serving
from benchmarks.serving.load import stream
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.config import LimitsConfig

LATENCIES_MS = (5, 20, 50)
NEW_TOKENS = 64
_ROWS = "".join(f"{name}: {count} items in room {room}.\n" for name, count, room in [
    ("apples", 31, "B12"), ("screws", 900, "A3"), ("blankets", 17, "C40"), ("lamps", 62, "A9"), ("maps", 8, "D1"),
])  # fmt: skip
# Greedy answers to the first kind repeat the prompt; sampled ones to the second kind repeat little.
PROMPTS: dict[str, list[tuple[str, dict[str, float]]]] = {
    "repetitive": [
        (f"This is the list of our store.\n{_ROWS}\nThe same list once more:\n{_ROWS}\nAnd again:\n", {}),
        ("def area(width, height):\n    return width * height\n\n" * 3, {}),
    ],
    "varied": [
        ("Here is a story that nobody has told before. Once upon a time", {"temperature": 1.0, "seed": 3}),
        ("A letter to a friend about the sea, the mountains and the weather:", {"temperature": 1.0, "seed": 4}),
    ],
}


def rate(cluster: Cluster, prompt: str, more: dict[str, float], streams: int = 1) -> float:
    """Tokens a second, while all of `streams` equal requests decode."""

    async def run() -> float:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=None) as client:
            timed = await asyncio.gather(*(stream(client, prompt, NEW_TOKENS, more) for _ in range(streams)))
        first_s, last_s = max(each.times_s[0] for each in timed), max(each.times_s[-1] for each in timed)
        return streams * (NEW_TOKENS - 1) / (last_s - first_s)

    return asyncio.run(run())


def gains(models: Path, latency_ms: float, repeats: int, streams: int = 1, weights: str = "int4") -> dict[str, float]:
    """By kind of prompt: tokens a second with drafts over those without (medians), and the share of right drafts."""
    off = Setup(2, weights, latency_ms=latency_ms)
    found: dict[str, float] = {}
    with serving(off, models) as without, serving(replace(off, drafts=LimitsConfig().drafts), models) as using:
        for cluster in (without, using):
            rate(cluster, *PROMPTS["varied"][0])  # the first passes of a process are slower
        for kind, prompts in PROMPTS.items():
            with ControlClient(using.url, using.token) as client:
                skip = len(client.records())
                ratios = [
                    rate(using, *prompt, streams) / rate(without, *prompt, streams)
                    for _ in range(repeats)
                    for prompt in prompts
                ]
                records = client.records(skip)
            found[kind] = statistics.median(ratios)
            drafted = sum(record.drafted for record in records)
            found[f"{kind}_accepted"] = sum(record.accepted for record in records) / drafted if drafted else 0.0
            found[f"{kind}_drafted_per_token"] = drafted / sum(record.new_tokens for record in records)
    return found


def speculation_figures(models: Path, repeats: int) -> dict[str, float]:
    """The gain over links of 5, 20 and 50 ms: of prompts that repeat themselves, and of prompts that do not."""
    figures: dict[str, float] = {}
    for latency_ms in LATENCIES_MS:
        found = gains(models, latency_ms, repeats)
        figures[f"speculation_gain_{latency_ms}ms"] = found["repetitive"]
        figures[f"speculation_gain_{latency_ms}ms_varied"] = found["varied"]
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.speculation", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"))
    parser.add_argument("--latencies-ms", type=float, nargs="+", default=LATENCIES_MS)
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--weights", nargs="+", default=["int4"])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    given.models.mkdir(parents=True, exist_ok=True)
    print("| weights | links, ms | streams | prompts | gain | drafts a token | right |\n|" + " --- |" * 7)
    for weights in given.weights:
        for latency_ms in given.latencies_ms:
            for streams in given.streams:
                found = gains(given.models, latency_ms, given.repeats, streams, weights)
                for kind in PROMPTS:
                    shown = f"{found[kind]:.2f} | {found[f'{kind}_drafted_per_token']:.2f} | "
                    shown += f"{found[f'{kind}_accepted']:.0%} |"
                    print(f"| {weights} | {latency_ms:g} | {streams} | {kind} | {shown}", flush=True)


if __name__ == "__main__":
    main()
