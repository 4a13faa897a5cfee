"""Four times the load that a cluster can serve. Admitted requests finish in bounded time; others are refused at once.

The hardware is emulated, so that the capacity of the cluster does not depend on how busy this machine is.
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
from benchmarks.chaos.resources import sampling
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.status import ClusterStatus
from tests.support.cluster import MODEL, load_unsplit, make_model, started
from tests.support.processes import poll_until
from tests.support.streams import PROMPTS, expected_tokens

LASTS_S = 600.0
OVERLOAD = 4.0
SESSIONS, QUEUE, KV_TOKENS, SLO_S = 8, 8, 256, 5.0
NEW_TOKENS = {"prompt": 16, "patient": 32}
_PATIENT_SHARE = 0.15  # share of requests in the class without a service objective
_LEAVES_SHARE = 0.1  # share of clients that disconnect in the middle
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
class RequestOutcome:
    """The outcome of one request; `message` is that of an error."""

    request_class: str
    status: int
    took_s: float
    message: str = ""
    retry_after_s: float | None = None
    tokens: int = 0
    right: bool = True


@dataclass
class Client:
    """Sends requests to one gateway and compares the tokens with the expected ones."""

    http: httpx.AsyncClient
    expected: list[list[int]]
    outcomes: list[RequestOutcome] = field(default_factory=list)

    async def send_request(self, number: int, request_class: str, leaves_after: int | None = None) -> None:
        """Send one streamed request. The client disconnects after `leaves_after` tokens."""
        prompt, new_tokens = PROMPTS[number % len(PROMPTS)], NEW_TOKENS[request_class]
        body = {"model": MODEL, "prompt": prompt, "max_tokens": new_tokens, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        begun_s = time.monotonic()
        outcome = RequestOutcome(request_class, 0, 0.0)
        tokens: list[int] = []
        headers = {"X-Resplit-Class": request_class}
        try:
            async with self.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                outcome.status = response.status_code
                if response.status_code != 200:
                    outcome.message = json.loads(await response.aread())["error"]["message"]
                    outcome.retry_after_s = float(response.headers.get("Retry-After", "nan"))
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            outcome.status, outcome.message = 500, event["error"]["message"]
                            break
                        tokens += event["choices"][0].get("token_ids") or []
                    if leaves_after is not None and len(tokens) >= leaves_after:
                        outcome.status = 499
                        break
        except httpx.HTTPError as error:
            outcome.status, outcome.message = -1, type(error).__name__
        outcome.took_s, outcome.tokens = time.monotonic() - begun_s, len(tokens)
        outcome.right = tokens == self.expected[number % len(PROMPTS)][: len(tokens)]
        self.outcomes.append(outcome)

    async def capacity(self, lasts_s: float) -> tuple[float, float]:
        """Requests and tokens per second that the cluster serves while all sessions are in use."""
        until_s, before = time.monotonic() + lasts_s, len(self.outcomes)
        rng = random.Random(1)

        async def keep_asking(number: int) -> None:
            while time.monotonic() < until_s:
                await self.send_request(number, _class(rng))

        await asyncio.gather(*(keep_asking(number) for number in range(SESSIONS)))
        took_s = time.monotonic() - until_s + lasts_s
        return len(self.outcomes[before:]) / took_s, sum(o.tokens for o in self.outcomes[before:]) / took_s

    async def load(self, rps: float, lasts_s: float) -> None:
        """Send requests as a Poisson process, independent of answers. Returns after the last arrival."""
        rng, due_s = random.Random(2), time.monotonic()
        until_s, number = due_s + lasts_s, 0
        self.in_flight: set[asyncio.Task[None]] = set()
        while (due_s := due_s + rng.expovariate(rps)) < until_s:
            await asyncio.sleep(due_s - time.monotonic())
            leaves = rng.randrange(1, 10) if rng.random() < _LEAVES_SHARE else None
            task = asyncio.create_task(self.send_request(number, _class(rng), leaves))
            self.in_flight.add(task)
            task.add_done_callback(self.in_flight.discard)
            number += 1

    async def drained(self) -> float:
        """Wait for the answers to all requests of `load`. Returns the moment of the last one (monotonic clock)."""
        while self.in_flight:
            await asyncio.wait(self.in_flight)
        return time.monotonic()

    async def lone_latency_s(self) -> float:
        """The median latency of five requests sent one after another; infinite if one is not served."""
        before = len(self.outcomes)
        for number in range(5):
            await self.send_request(number, "prompt")
        return median(o.took_s if o.status == 200 else math.inf for o in self.outcomes[before:])


@dataclass(frozen=True)
class Measurements:
    """The results of one overload. Rates are per second; latencies are those of a lone request."""

    served_rps: float  # at saturation
    served_tokens_ps: float  # at saturation
    tokens_ps: float  # under overload
    before_s: float
    after_s: float
    drained_s: float  # from the last arrival to the last answer
    outcomes: list[RequestOutcome]


@dataclass
class ClusterPeaks:
    """The highest values seen inside the cluster, sampled once a second."""

    sessions: int = 0
    waiting: int = 0
    memory: float = 0.0  # share of its memory that the fullest node holds
    tasks: list[float] = field(default_factory=list)

    async def keep_sampling(self, cluster: Cluster, http: httpx.AsyncClient) -> None:
        """Sample until cancelled."""
        with ControlClient(cluster.url, cluster.token) as client:
            while True:
                status = await asyncio.to_thread(client.status)
                self.sessions = max(self.sessions, status.sessions)
                self.waiting = max(self.waiting, status.waiting)
                held = [node.held_bytes / node.memory_bytes for node in status.nodes]
                self.memory = max([self.memory, *held])
                exposed = (await http.get("/metrics")).text
                self.tasks.append(float(exposed.partition("\nresplit_tasks ")[2].partition("\n")[0]))
                await asyncio.sleep(1.0)


def _class(rng: random.Random) -> str:
    return "patient" if rng.random() < _PATIENT_SHARE else "prompt"


async def run(scale: float, folder: Path) -> list[Finding]:
    """Ten minutes of overload, with the latency of a lone request before and after."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), max(NEW_TOKENS.values()))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    with started(folder, model, CLUSTER) as cluster, ControlClient(cluster.url, cluster.token) as control:
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=60, limits=limits) as http,
            sampling(cluster) as usage,
        ):
            peaks = ClusterPeaks()
            measured = await measure(cluster, http, expected, peaks, scale)
        await poll_until(lambda: not any(node.sessions for node in control.status().nodes), 10)
        state_after = control.status()
    (folder / "outcomes.json").write_text(json.dumps([vars(outcome) for outcome in measured.outcomes]))
    return [
        *_rate_findings(measured),
        *_request_findings(measured.outcomes, measured.served_rps),
        *_refusal_findings([outcome for outcome in measured.outcomes if outcome.status == 429]),
        *_peak_findings(peaks, state_after),
        *_recovery_findings(measured),
        *usage.findings("overload"),
    ]


async def measure(
    cluster: Cluster, http: httpx.AsyncClient, expected: list[list[int]], peaks: ClusterPeaks, scale: float
) -> Measurements:
    """Saturate the cluster, then overload it, and measure a lone request before and after. Fills `peaks`."""
    client = Client(http, expected)
    before_s = await client.lone_latency_s()
    served_rps, served_tokens_ps = await client.capacity(max(8.0, 30.0 * scale))
    client.outcomes.clear()
    sampling_task = asyncio.create_task(peaks.keep_sampling(cluster, http))
    begun_s = time.monotonic()
    await client.load(OVERLOAD * served_rps, max(15.0, LASTS_S * scale))
    ended_s = time.monotonic()
    draining = asyncio.create_task(client.drained())
    await asyncio.sleep(_NORMAL_AFTER_S)
    after_s = await Client(http, expected).lone_latency_s()
    drained_s = await draining - ended_s
    sampling_task.cancel()
    tokens_ps = sum(outcome.tokens for outcome in client.outcomes) / (ended_s + drained_s - begun_s)
    return Measurements(served_rps, served_tokens_ps, tokens_ps, before_s, after_s, drained_s, client.outcomes)


def _rate_findings(measured: Measurements) -> list[Finding]:
    served_rps, tokens_ps, served_tokens_ps = measured.served_rps, measured.tokens_ps, measured.served_tokens_ps
    return [
        Finding(
            "overload",
            "load served at saturation, and load offered",
            f"{served_rps:.1f} and {OVERLOAD * served_rps:.1f} a second",
        ),
        Finding(
            "overload",
            "tokens per second under overload, relative to saturation",
            f"{tokens_ps / served_tokens_ps:.2f} ({tokens_ps:.0f} of {served_tokens_ps:.0f})",
            ">= 0.8",
            met=tokens_ps >= 0.8 * served_tokens_ps,
        ),
    ]


def _recovery_findings(measured: Measurements) -> list[Finding]:
    before_s, after_s = measured.before_s, measured.after_s
    return [
        Finding("overload", "time from the last arrival to the last answer", f"{measured.drained_s:.1f} s"),
        Finding(
            "overload",
            f"latency of a request {_NORMAL_AFTER_S:g} s after the last arrival, relative to one before the load",
            f"{after_s / before_s:.2f} ({after_s:.2f} s to {before_s:.2f} s)",
            "<= 1.25",
            met=after_s <= 1.25 * before_s,
        ),
    ]


def _request_findings(outcomes: list[RequestOutcome], served_rps: float) -> list[Finding]:
    statuses = Counter(outcome.status for outcome in outcomes)
    served = {name: [o.took_s for o in outcomes if (o.request_class, o.status) == (name, 200)] for name in NEW_TOKENS}
    # The time to serve all sessions and the whole queue, doubled because requests differ in length.
    bound_s = 2 * (SESSIONS + QUEUE) / served_rps
    return [
        Finding(
            "overload",
            "requests by status (499: the client disconnected)",
            ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items())),
            "200, 429 and 499 alone",
            met=set(statuses) <= {200, 429, 499},
        ),
        Finding(
            "overload",
            f"latency of admitted requests with an objective of {SLO_S:g} s",
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
            "latency of admitted requests without an objective",
            spread(served["patient"], "s"),
            f"max <= {bound_s:.0f} s",
            met=max(served["patient"], default=0.0) <= bound_s,
        ),
        Finding(
            "overload",
            "streams with wrong tokens",
            f"{sum(not o.right for o in outcomes)} streams",
            "0",
            all(o.right for o in outcomes),
        ),
    ]


def _refusal_findings(refused: list[RequestOutcome]) -> list[Finding]:
    at_once = sum(outcome.took_s <= 0.25 for outcome in refused) / max(1, len(refused))
    return [
        Finding("overload", "time to a 429", spread([outcome.took_s for outcome in refused])),
        Finding(
            "overload",
            "429 within 250 ms of the arrival (the others waited in the queue first)",
            f"{100 * at_once:.1f} %",
            ">= 95 %",
            met=at_once >= 0.95,
        ),
        _reason_finding(refused),
        Finding(
            "overload",
            "429 with a Retry-After",
            f"{sum((o.retry_after_s or 0) >= 1 for o in refused)} of {len(refused)}, "
            f"{spread([o.retry_after_s or 0 for o in refused], 's')}",
            "all",
            met=all((o.retry_after_s or 0) >= 1 for o in refused),
        ),
    ]


def _reason_finding(refused: list[RequestOutcome]) -> Finding:
    words = {"count": "sessions run", "memory": "cached tokens are reserved", "slo": "in which this class"}
    counted = {name: sum(message in outcome.message for outcome in refused) for name, message in words.items()}
    counts = ", ".join(f"{name} {number}" for name, number in counted.items())
    met = all(counted.values()) and sum(counted.values()) == len(refused)
    return Finding("overload", "429 by reason", counts, "each of them, and no other", met)


def _peak_findings(peaks: ClusterPeaks, state_after: ClusterStatus) -> list[Finding]:
    tenth = max(1, len(peaks.tasks) // 10)
    grown = median(peaks.tasks[-tenth:]) - median(peaks.tasks[:tenth]) if peaks.tasks else 0.0
    return [
        Finding(
            "overload",
            "most sessions, and most queued requests, at once",
            f"{peaks.sessions} and {peaks.waiting}",
            f"<= {SESSIONS} and {QUEUE}",
            met=peaks.sessions <= SESSIONS and peaks.waiting <= QUEUE,
        ),
        Finding(
            "overload",
            "weights and caches on the fullest node, of its memory",
            f"{100 * peaks.memory:.0f} %",
            "<= 100 %",
            met=peaks.memory <= 1,
        ),
        Finding("overload", "growth of the gateway's tasks", f"{grown:+.0f}", "<= 16", met=grown <= 16),
        Finding(
            "overload",
            "sessions, and queued requests, at the end",
            f"{state_after.sessions} and {state_after.waiting}",
            "0 and 0",
            met=(state_after.sessions, state_after.waiting) == (0, 0),
        ),
    ]
