"""Four times the load that a cluster can carry: who is let in is served in bounded time, the rest is told so at once.

The hardware is emulated, so that what the cluster can carry does not depend on how busy this machine is.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx

from benchmarks.chaos.findings import Finding, quantile, spread
from benchmarks.chaos.resources import watching
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from tests.support.cluster import MODEL, load_unsplit, make_model, started
from tests.support.processes import poll_until
from tests.support.streams import PROMPTS, expected_tokens

LASTS_S = 600.0
OVERLOAD = 4.0
SESSIONS, QUEUE, KV_TOKENS, SLO_S = 8, 8, 256, 5.0
NEW_TOKENS = {"prompt": 16, "patient": 32}
_PATIENT_SHARE = 0.15  # of the requests come in a class that asks for no promise
_LEAVES_SHARE = 0.1  # of the clients hang up in the middle
_NORMAL_AFTER_S = 5.0
_TIMES = "{embed: 0.5 ms, layer: 5 ms, head: 5 ms}"
_EMULATE = f"emulate: {{decode_per_token: {_TIMES}, prefill_per_token: {{embed: 0.1 ms, layer: 0.5 ms, head: 0 ms}}}}"
CLUSTER = f"""
name: overload
source: alpha
trusted: [alpha, beta]
nodes:
  - {{name: alpha, memory: 1 MiB, {_EMULATE}}}
  - {{name: beta, memory: 1 MiB, {_EMULATE}}}
  - {{name: gamma, memory: 1 MiB, {_EMULATE}}}
  - {{name: delta, memory: 1 MiB, {_EMULATE}}}
links: {{default: {{latency: 2 ms, bandwidth: 300 Mbit/s}}}}
classes:
  - {{name: prompt, slo: {SLO_S} s, shed_late: true, rate_rps: 0.3, prompt_tokens: 8, new_tokens: 16}}
  - {{name: patient, rate_rps: 0.1, prompt_tokens: 8, new_tokens: 32}}
limits: {{context_tokens: 128, sessions: {SESSIONS}, queue: {QUEUE}, deadline: 30 s}}
kv_tokens: {KV_TOKENS}
"""


@dataclass
class Outcome:
    """One request: what came of it and how long that took; `said` is the error's message."""

    request_class: str
    status: int
    took_s: float
    said: str = ""
    retry_after_s: float | None = None
    tokens: int = 0
    right: bool = True


@dataclass
class Client:
    """Sends requests to one gateway, knowing what they must be answered with."""

    http: httpx.AsyncClient
    expected: list[list[int]]
    outcomes: list[Outcome] = field(default_factory=list)

    async def ask(self, number: int, request_class: str, leaves_after: int | None = None) -> None:
        """One streamed request; `leaves_after` so many tokens the client hangs up."""
        prompt, new_tokens = PROMPTS[number % len(PROMPTS)], NEW_TOKENS[request_class]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": new_tokens, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        begun_s = time.monotonic()
        outcome = Outcome(request_class, 0, 0.0)
        tokens: list[int] = []
        headers = {"X-Resplit-Class": request_class}
        try:
            async with self.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                outcome.status = response.status_code
                if response.status_code != 200:
                    outcome.said = json.loads(await response.aread())["error"]["message"]
                    outcome.retry_after_s = float(response.headers.get("Retry-After", "nan"))
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            outcome.status, outcome.said = 500, event["error"]["message"]
                            break
                        tokens += event["choices"][0].get("token_ids") or []
                    if leaves_after is not None and len(tokens) >= leaves_after:
                        outcome.status = 499
                        break
        except httpx.HTTPError as error:
            outcome.status, outcome.said = -1, type(error).__name__
        outcome.took_s, outcome.tokens = time.monotonic() - begun_s, len(tokens)
        outcome.right = tokens == self.expected[number % len(PROMPTS)][: len(tokens)]
        self.outcomes.append(outcome)

    async def carried(self, lasts_s: float) -> tuple[float, float]:
        """Requests, and tokens, a second that the cluster carries when all sessions are always taken."""
        until_s, before = time.monotonic() + lasts_s, len(self.outcomes)
        rng = random.Random(1)

        async def keep_asking(number: int) -> None:
            while time.monotonic() < until_s:
                await self.ask(number, _class(rng))

        await asyncio.gather(*(keep_asking(number) for number in range(SESSIONS)))
        took_s = time.monotonic() - until_s + lasts_s
        return len(self.outcomes[before:]) / took_s, sum(o.tokens for o in self.outcomes[before:]) / took_s

    async def load(self, rps: float, lasts_s: float) -> None:
        """Poisson arrivals that wait for nobody; returns when the last one has arrived, and its requests in flight."""
        rng, due_s = random.Random(2), time.monotonic()
        until_s, number = due_s + lasts_s, 0
        self.flying: set[asyncio.Task[None]] = set()
        while (due_s := due_s + rng.expovariate(rps)) < until_s:
            await asyncio.sleep(due_s - time.monotonic())
            leaves = rng.randrange(1, 10) if rng.random() < _LEAVES_SHARE else None
            task = asyncio.create_task(self.ask(number, _class(rng), leaves))
            self.flying.add(task)
            task.add_done_callback(self.flying.discard)
            number += 1

    async def drained(self) -> float:
        """Wait for the answers to all that `load` sent; the moment of the last one (monotonic clock)."""
        while self.flying:
            await asyncio.wait(self.flying)
        return time.monotonic()

    async def alone_s(self) -> float:
        """How long a request takes that this client sends alone: the median of five, which must all be served."""
        before = len(self.outcomes)
        for number in range(5):
            await self.ask(number, "prompt")
        return median(o.took_s if o.status == 200 else math.inf for o in self.outcomes[before:])


@dataclass
class Inside:
    """The most that was ever seen inside the cluster, a look a second."""

    sessions: int = 0
    waiting: int = 0
    memory: float = 0.0  # held, as a share of the ceiling, of the node where it is highest
    tasks: list[float] = field(default_factory=list)

    async def keep_looking(self, cluster: Cluster, http: httpx.AsyncClient) -> None:
        """Until cancelled."""
        with ControlClient(cluster.url, cluster.token) as client:
            while True:
                status = await asyncio.to_thread(client.status)
                self.sessions = max(self.sessions, status["sessions"])
                self.waiting = max(self.waiting, status["waiting"])
                held = [node["held_bytes"] / node["memory_bytes"] for node in status["nodes"]]
                self.memory = max([self.memory, *held])
                exposed = (await http.get("/metrics")).text
                self.tasks.append(float(exposed.partition("\nresplit_tasks ")[2].partition("\n")[0]))
                await asyncio.sleep(1.0)


def _class(rng: random.Random) -> str:
    return "patient" if rng.random() < _PATIENT_SHARE else "prompt"


async def run(scale: float, folder: Path) -> list[Finding]:
    """Ten minutes of it; measured before and after by a request that comes alone."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), max(NEW_TOKENS.values()))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    with started(folder, model, CLUSTER) as cluster, ControlClient(cluster.url, cluster.token) as control:
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=60, limits=limits) as http,
            watching(cluster) as watch,
        ):
            client, inside = Client(http, expected), Inside()
            before_s = await client.alone_s()
            carried_rps, carried_tps = await client.carried(max(8.0, 30.0 * scale))
            client.outcomes.clear()
            looking = asyncio.create_task(inside.keep_looking(cluster, http))
            begun_s = time.monotonic()
            await client.load(OVERLOAD * carried_rps, max(15.0, LASTS_S * scale))
            ended_s = time.monotonic()
            draining = asyncio.create_task(client.drained())
            await asyncio.sleep(_NORMAL_AFTER_S)
            later = Client(http, expected)
            after_s = await later.alone_s()
            drained_s = await draining - ended_s
            looking.cancel()
            outcomes = client.outcomes
        await poll_until(lambda: not any(node["sessions"] for node in control.status()["nodes"]), 10)
        left = control.status()
    tokens_ps = sum(outcome.tokens for outcome in outcomes) / (ended_s + drained_s - begun_s)
    (folder / "outcomes.json").write_text(json.dumps([vars(outcome) for outcome in outcomes]))
    return [
        Finding(
            "overload", "load carried, and offered", f"{carried_rps:.1f} and {OVERLOAD * carried_rps:.1f} a second"
        ),
        Finding(
            "overload",
            "tokens a second under the load, relative to those carried",
            f"{tokens_ps / carried_tps:.2f} ({tokens_ps:.0f} of {carried_tps:.0f})",
            ">= 0.8",
            met=tokens_ps >= 0.8 * carried_tps,
        ),
        *_of_requests(outcomes, carried_rps),
        *_of_the_inside(inside, left),
        Finding("overload", "last answer after the last arrival", f"{drained_s:.1f} s"),
        Finding(
            "overload",
            f"a request {_NORMAL_AFTER_S:g} s after the last arrival, to one before the load",
            f"{after_s / before_s:.2f} ({after_s:.2f} s to {before_s:.2f} s)",
            "<= 1.25",
            met=after_s <= 1.25 * before_s,
        ),
        *watch.findings("overload"),
    ]


def _of_requests(outcomes: list[Outcome], carried_rps: float) -> list[Finding]:
    statuses = Counter(outcome.status for outcome in outcomes)
    served = {name: [o.took_s for o in outcomes if (o.request_class, o.status) == (name, 200)] for name in NEW_TOKENS}
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    at_once = sum(outcome.took_s <= 0.25 for outcome in refused) / max(1, len(refused))
    # All who are inside and in line before it, at the pace carried, and as much again for how uneven requests are.
    bound_s = 2 * (SESSIONS + QUEUE) / carried_rps
    return [
        Finding(
            "overload",
            "requests by status (499: the client hung up)",
            ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items())),
            "200, 429 and 499 alone",
            met=set(statuses) <= {200, 429, 499},
        ),
        Finding(
            "overload",
            f"latency of those admitted that were promised {SLO_S:g} s",
            spread(served["prompt"], "s"),
            f"p95 <= {1.25 * SLO_S:g} s",
            met=quantile(served["prompt"], 0.95) <= 1.25 * SLO_S,
        ),
        Finding(
            "overload",
            f"of these, within {SLO_S:g} s",
            f"{100 * sum(s <= SLO_S for s in served['prompt']) / max(1, len(served['prompt'])):.1f} %",
        ),
        Finding(
            "overload",
            "latency of those admitted that were promised nothing",
            spread(served["patient"], "s"),
            f"max <= {bound_s:.0f} s",
            met=max(served["patient"], default=0.0) <= bound_s,
        ),
        Finding(
            "overload",
            "time to a 429",
            spread([outcome.took_s for outcome in refused]),
        ),
        Finding(
            "overload",
            "429 within 250 ms of the arrival, of all (the others had to wait in line until it was too late)",
            f"{100 * at_once:.1f} %",
            ">= 95 %",
            met=at_once >= 0.95,
        ),
        _reasons(refused),
        Finding(
            "overload",
            "429 with a Retry-After",
            f"{sum((o.retry_after_s or 0) >= 1 for o in refused)} of {len(refused)}, "
            f"{spread([o.retry_after_s or 0 for o in refused], 's')}",
            "all",
            met=all((o.retry_after_s or 0) >= 1 for o in refused),
        ),
        Finding(
            "overload",
            "wrong tokens",
            f"{sum(not o.right for o in outcomes)} streams",
            "0",
            all(o.right for o in outcomes),
        ),
    ]


def _reasons(refused: list[Outcome]) -> Finding:
    words = {"count": "sessions run", "memory": "cached tokens are reserved", "slo": "within which this class"}
    counted = {name: sum(said in outcome.said for outcome in refused) for name, said in words.items()}
    told = ", ".join(f"{name} {number}" for name, number in counted.items())
    met = all(counted.values()) and sum(counted.values()) == len(refused)
    return Finding("overload", "429 by reason", told, "each of them, and no other", met)


def _of_the_inside(inside: Inside, left: dict[str, object]) -> list[Finding]:
    tenth = max(1, len(inside.tasks) // 10)
    grown = median(inside.tasks[-tenth:]) - median(inside.tasks[:tenth]) if inside.tasks else 0.0
    return [
        Finding(
            "overload",
            "most sessions and requests in line at once",
            f"{inside.sessions} and {inside.waiting}",
            f"<= {SESSIONS} and {QUEUE}",
            met=inside.sessions <= SESSIONS and inside.waiting <= QUEUE,
        ),
        Finding(
            "overload",
            "weights and caches on the fullest node, of its ceiling",
            f"{100 * inside.memory:.0f} %",
            "<= 100 %",
            met=inside.memory <= 1,
        ),
        Finding("overload", "growth of the gateway's tasks", f"{grown:+.0f}", "<= 16", met=grown <= 16),
        Finding(
            "overload",
            "sessions and requests in line when all is over",
            f"{left['sessions']} and {left['waiting']}",
            "0 and 0",
            met=(left["sessions"], left["waiting"]) == (0, 0),
        ),
    ]
