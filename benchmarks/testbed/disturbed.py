"""Links that jitter and lose packets, and nodes that seem lost: what a false loss costs, on the testbed."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import structlog

from benchmarks.testbed.home_day import calibrated, client_of
from benchmarks.testbed.layout import links_of
from benchmarks.testbed.machines import Pace, Testbed, running
from flows.params import Params
from resplit.cluster.client import ControlClient
from tasks.deploy import deploy_plan

__all__ = ["Disturbed", "disturb"]

_log = structlog.get_logger(__name__)
LATENCY_S, JITTER_S, LOSS = 0.040, 0.030, 0.03
STALL_S, STALL_EVERY_S = 0.8, 20.0
_SETTLE_S = 10.0
STREAMS, NEW_TOKENS = 2, 24
PROMPTS = ("Name three fruits.", "The sea is", "A short story about a dog:", "Once upon a time")


@dataclass
class Stall:
    """A stall of one node's links, the epochs that were committed until the next one, and the node's return."""

    node: str
    at_s: float
    moves: list[str] = field(default_factory=list)
    taken_for_lost: bool = False
    back_s: float | None = None  # from the end of the stall until the node answers

    def row(self) -> str:
        """The stall as a line of a table."""
        lost = "yes" if self.taken_for_lost else "no"
        back = "-" if self.back_s is None else f"{self.back_s:.1f} s"
        return f"| {self.at_s:.0f} s | {self.node} | {lost} | {', '.join(self.moves) or '-'} | {back} |"


@dataclass
class Disturbed:
    """What came of it. `wrong` are answers that were not those of the calm links, or none."""

    stalls: list[Stall]
    latencies_s: list[float] = field(default_factory=list)
    calm_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    moves_between: list[str] = field(default_factory=list)

    def text(self) -> str:
        """All as Markdown."""
        lost = [stall for stall in self.stalls if stall.taken_for_lost]
        twice = [stall for stall in lost if len(stall.moves) > 1]
        lines = [
            "| at | stalled | taken for lost | moves | back after |",
            "| --- | --- | --- | --- | --- |",
            *(stall.row() for stall in self.stalls),
            "",
            f"{len(self.latencies_s)} answers, {len(self.wrong)} of them wrong or missing; median "
            f"{statistics.median(self.latencies_s or [0]):.2f} s, on calm links {self.calm_s:.2f} s.",
            f"{len(lost)} of {len(self.stalls)} stalled nodes were taken for lost, {len(twice)} with a second move.",
        ]
        return "\n".join([*lines, *self.wrong[:5]])


def disturb(params: Params, state: Path, seconds: float, pace: Pace) -> Disturbed:
    """Serve some streams for so long while links jitter, lose packets and stall; only the controller decides."""
    with running(params.cluster, state, params.model, pace) as testbed, client_of(testbed) as client:
        start = calibrated(testbed, client)
        deploy_plan(client, start.first, client.model().epoch)
        client.arm_fast_loop(params.adapt.settings(), seconds + 60)
        return asyncio.run(_disturb(testbed, client, seconds))


async def _disturb(testbed: Testbed, client: ControlClient, seconds: float) -> Disturbed:
    model = client.model().name
    async with httpx.AsyncClient(base_url=testbed.cluster.url, timeout=120) as http:
        begun_s = time.monotonic()
        expected = {prompt: await _answer(http, model, prompt) for prompt in PROMPTS}
        found = Disturbed([], calm_s=(time.monotonic() - begun_s) / len(PROMPTS))
        for link in links_of(testbed.declared):
            shape = replace(link.shape, latency_s=LATENCY_S, jitter_s=JITTER_S, loss=LOSS)
            await asyncio.to_thread(testbed.network.shape, link.between, shape)
        await asyncio.sleep(_SETTLE_S)
        stop = asyncio.Event()
        streams = [asyncio.create_task(_stream(http, model, expected, found, stop)) for _ in range(STREAMS)]
        await _stall_in_turn(testbed, client, seconds, found)
        stop.set()
        await asyncio.gather(*streams)
    return found


async def _stream(
    http: httpx.AsyncClient, model: str, expected: dict[str, str], found: Disturbed, stop: asyncio.Event
) -> None:
    for prompt in itertools.cycle(PROMPTS):
        if stop.is_set():
            return
        begun_s = time.monotonic()
        try:
            text = await _answer(http, model, prompt)
        except (httpx.HTTPError, KeyError) as error:
            found.wrong.append(f"{prompt!r}: {error!r}")
            continue
        found.latencies_s.append(time.monotonic() - begun_s)
        if text != expected[prompt]:
            found.wrong.append(f"{prompt!r}: {text!r} instead of {expected[prompt]!r}")


async def _answer(http: httpx.AsyncClient, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


async def _stall_in_turn(testbed: Testbed, client: ControlClient, seconds: float, found: Disturbed) -> None:
    """Stall each node but the source in turn, and note what the controller does until the next stall."""
    begun_s = time.monotonic()
    others: Iterator[str] = itertools.cycle(n for n in testbed.declared.node_names if n != testbed.declared.source)
    while time.monotonic() + STALL_EVERY_S <= begun_s + seconds:
        stall = Stall(next(others), time.monotonic() - begun_s)
        found.stalls.append(stall)
        epoch = (await asyncio.to_thread(client.status)).epoch
        testbed.network.stall(stall.node, STALL_S)
        await _watch(client, stall, time.monotonic() + STALL_EVERY_S)
        committed = await asyncio.to_thread(client.epochs)
        stall.moves += [each.action for each in committed if each.epoch > epoch]
        _log.info("stall", **json.loads(json.dumps(vars(stall))))


async def _watch(client: ControlClient, stall: Stall, until_s: float) -> None:
    """Note whether the node is lost after the stall, and when it is back."""
    over_s = time.monotonic() + STALL_S
    while time.monotonic() < until_s:
        status = await asyncio.to_thread(client.status)
        answers = next(node.answers for node in status.nodes if node.node == stall.node)
        if not answers:
            stall.taken_for_lost = True
        elif stall.taken_for_lost and stall.back_s is None:
            stall.back_s = time.monotonic() - over_s
        await asyncio.sleep(0.1)
