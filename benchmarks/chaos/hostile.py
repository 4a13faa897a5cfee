"""A member says anything at any moment, with its own valid credentials, while streams run and until it is excluded.

In every other round it hosts no block: then no stream may notice. In the others it hosts blocks: then its streams may
get anything, but the rest holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.chaos.findings import Finding, quantile, spread, stream_findings
from benchmarks.chaos.hostile_member import MODES, NOTES_EVERY_S, PRIVATE, Mode
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from tests.support.cluster import CLUSTER, load_unsplit, make_model, started
from tests.support.processes import answering, kill, poll_until, ready
from tests.support.streams import PROMPTS, Streams, expected_tokens, streaming

ROUNDS = 24
NEW_TOKENS = 64
LASTS_S = 5.0
ANSWERS_WITHIN_S = 5.0
EXCLUDED_WITHIN_S = 45.0
HOSTILE = "delta"
LANES = PROMPTS[:4]
# Delta is trusted at first, so that it can lose that. The load is so small that a plan exists on a slow machine.
_TEXT = (
    CLUSTER.replace("trusted: [alpha, beta]", "trusted: [alpha, beta, delta]")
    .replace("rate_rps: 0.5", "rate_rps: 0.02")
    .replace("deadline: 60 s", "deadline: 15 s")
)
_OUTSIDE = ("alpha", "beta", "gamma", "alpha", "gamma", "beta", "beta", "alpha")
_INSIDE = ("alpha", "alpha", "beta", HOSTILE, HOSTILE, "gamma", "beta", "beta")
_PRIVATE_INSIDE = (HOSTILE, HOSTILE, "beta", "gamma", "alpha", "gamma", "beta", HOSTILE)
EXCLUSIONS = ("drain", "untrust", "remove")


@dataclass
class Seen:
    """What all rounds saw. `excluded_s` has the seconds of each exclusion by its kind."""

    beside: Streams = field(default_factory=lambda: Streams([]))
    along: Streams = field(default_factory=lambda: Streams([]))
    after: Streams = field(default_factory=lambda: Streams([]))
    excluded_s: dict[str, list[float]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    answers_s: list[float] = field(default_factory=list)
    no_answer: list[str] = field(default_factory=list)
    said: Counter[str] = field(default_factory=Counter)
    private_before: int = 0
    private_after: int = 0
    exposed: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


async def run(scale: float, folder: Path) -> list[Finding]:
    """24 rounds: each way of being hostile, with each exclusion, once beside the streams and once on their route."""
    model, seen, rng = make_model(folder), Seen(), random.Random(5)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS, LANES)
    rounds = [*itertools.product(MODES, EXCLUSIONS, (False, True))]
    rng.shuffle(rounds)
    with started(folder, model, _TEXT) as cluster, ControlClient(cluster.url, cluster.token) as client:
        content = yaml.safe_load((cluster.state / "cluster.yaml").read_text())
        for number in range(max(1, round(ROUNDS * scale))):
            mode, exclusion, inside = rounds[number % len(rounds)]
            print(f"  {number}: {mode}, {exclusion}, {'inside' if inside else 'outside'}", flush=True)
            one = _Round(cluster, client, content, seen, expected, folder / f"member-{number}.json", number)
            await one.run(mode, exclusion, inside)
    return _findings(seen)


@dataclass
class _Round:
    cluster: Cluster
    client: ControlClient
    content: dict[str, Any]
    seen: Seen
    expected: list[list[int]]
    out: Path
    number: int

    async def run(self, mode: Mode, exclusion: str, inside: bool) -> None:
        """Let the member join, attack and be excluded; then remove it."""
        await self._join(mode)
        placement = _OUTSIDE if not inside else _PRIVATE_INSIDE if exclusion == "untrust" else _INSIDE
        await asyncio.to_thread(self._deploy, placement)
        async with self._watching(), self._streams(inside):
            self.cluster.processes[HOSTILE].send_signal(signal.SIGUSR1)
            await asyncio.sleep(random.Random(self.number).uniform(0.2, LASTS_S) if inside else LASTS_S)
            excluded_s = await self._exclude(exclusion)
            self._note_exposed(trusted={"alpha", "beta"} if exclusion != "drain" else {"alpha", "beta", HOSTILE})
        async with streaming(self.cluster, self.expected, LANES) as after:
            pass
        _add(self.seen.after, after)
        await self._exclude("remove")
        await asyncio.sleep(2 * NOTES_EVERY_S)
        self._note_member(excluded_s if exclusion == "untrust" else time.time())
        self.seen.ended += [name for name in self.cluster.dead() if name != HOSTILE]
        kill(self.cluster, HOSTILE)

    async def _join(self, mode: Mode) -> None:
        """Start the member's process, and add it to the cluster as a trusted node."""
        arguments = [str(self.cluster.state), HOSTILE, mode, str(self.number), str(self.out)]
        if not self.cluster.processes[HOSTILE].poll():
            with contextlib.suppress(ProcessLookupError):
                kill(self.cluster, HOSTILE)
        start_process(self.cluster, HOSTILE, [sys.executable, "-m", "benchmarks.chaos.hostile_member", *arguments])
        await poll_until(self.out.exists)
        await asyncio.to_thread(self.client.apply, self.content)
        await poll_until(lambda: answering(self.client, HOSTILE) and ready(self.client))

    def _deploy(self, placement: tuple[str, ...]) -> None:
        while True:
            live = self.client.model()
            if tuple(live.placement or ()) == placement:
                return
            try:
                self.client.propose(Proposal(placement, "re-split", live.epoch))
            except ProposalRefusedError:  # the member has just joined, which changed the epoch
                time.sleep(0.1)

    @contextlib.asynccontextmanager
    async def _streams(self, inside: bool) -> AsyncIterator[None]:
        async with streaming(self.cluster, self.expected, LANES) as streams:
            yield
        _add(self.seen.along if inside else self.seen.beside, streams)

    async def _exclude(self, how: str) -> float:
        """Exclude the member. Returns the moment at which the command had returned (seconds since 1970)."""
        others = [node for node in self.content["nodes"] if node["name"] != HOSTILE]
        without = {**self.content, "nodes": others, "trusted": ["alpha", "beta"]}
        commands: dict[str, Callable[[], object]] = {
            "drain": lambda: self.client.drain(HOSTILE),
            "untrust": lambda: self.client.trust(HOSTILE, False),
            "remove": lambda: self.client.apply(without),
        }
        begun_s = time.monotonic()
        try:
            await asyncio.to_thread(commands[how])
        except Exception as error:
            self.seen.refused.append(f"{how}: {error}")
        self.seen.excluded_s.setdefault(how, []).append(time.monotonic() - begun_s)
        return time.time()

    def _note_exposed(self, trusted: set[str]) -> None:
        """Private blocks in the live placement, or on an honest node, against the rule."""
        status = self.client.status()
        held = [(index, node) for index, node in enumerate(status.placement or ())]
        held += [(index, node.node) for node in status.nodes if node.node != HOSTILE for index in node.blocks]
        self.seen.exposed += [f"{index} on {node}" for index, node in held if index in PRIVATE and node not in trusted]

    def _note_member(self, untrusted_s: float) -> None:
        noted = json.loads(self.out.read_text())
        self.seen.said.update(noted["said"])
        late = sum(at_s > untrusted_s for at_s in noted["private_s"])
        self.seen.private_after += late
        self.seen.private_before += len(noted["private_s"]) - late

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Ask for the gateway's health and for a refused request, four times a second."""
        body = {"model": "none", "prompt": "a"}

        async def keep_asking(http: httpx.AsyncClient) -> None:
            while True:
                begun_s = time.monotonic()
                try:
                    health, refused = await http.get("/healthz"), await http.post("/v1/completions", json=body)
                    if (health.status_code, refused.status_code) != (200, 404):
                        self.seen.no_answer.append(f"{health.status_code}, {refused.status_code}")
                except httpx.HTTPError as error:
                    self.seen.no_answer.append(repr(error))
                self.seen.answers_s.append(time.monotonic() - begun_s)
                await asyncio.sleep(0.25)

        async with httpx.AsyncClient(base_url=self.cluster.url, timeout=ANSWERS_WITHIN_S) as http:
            asking = asyncio.create_task(keep_asking(http))
            try:
                yield
            finally:
                asking.cancel()
                await asyncio.wait({asking})


def _add(whole: Streams, part: Streams) -> None:
    whole.right += part.right
    whole.wrong += part.wrong
    whole.failed += part.failed


def _findings(seen: Seen) -> list[Finding]:
    name = "hostile"
    along = f"{seen.along.right} right, {seen.along.wrong} wrong, {len(seen.along.failed)} failed"
    unanswered = f"{len(seen.no_answer)} of {len(seen.answers_s)}" + _first(seen.no_answer)
    everything_s = [each for times in seen.excluded_s.values() for each in times]
    refused = f"{len(seen.refused)} of {len(everything_s)}{_first(seen.refused)}"
    said = ", ".join(f"{count} {what}" for what, count in sorted(seen.said.items()) if ":" not in what)
    lies = sum(count for what, count in seen.said.items() if ":" in what and "honest" not in what)
    bad = seen.after.wrong + len(seen.after.failed)
    after = f"{bad} of {seen.after.right + bad}"
    return [
        *stream_findings(name, seen.beside),
        Finding(name, "streams with the member on their route", along),
        Finding(name, "streams after its exclusion that failed or had a wrong token", after, "0", not bad),
        Finding(name, "questions that the gateway did not answer", unanswered, "0", not seen.no_answer),
        Finding(name, "time to two answers of the gateway", spread(seen.answers_s)),
        Finding(name, "exclusions that were refused", refused, "0", not seen.refused),
        *(
            Finding(
                name,
                f"time of a command to {how} the member",
                spread(times, "s"),
                f"max < {EXCLUDED_WITHIN_S:g} s",
                quantile(times, 1.0) < EXCLUDED_WITHIN_S,
            )
            for how, times in sorted(seen.excluded_s.items())
        ),
        Finding(name, "private blocks on nodes without trust", f"{len(seen.exposed)}", "0", not seen.exposed),
        Finding(
            name,
            "prompts and parts of private caches that the member got once `untrust` had returned",
            f"{seen.private_after} ({seen.private_before} before)",
            "0",
            seen.private_after == 0,
        ),
        Finding(name, "what the member said", f"{said}, {lies} lies in answers", "> 0", lies > 0),
        Finding(name, "other processes that ended", ", ".join(seen.ended) or "none", "none", not seen.ended),
    ]


def _first(texts: list[str]) -> str:
    return f" ({texts[0][:100]})" if texts else ""
