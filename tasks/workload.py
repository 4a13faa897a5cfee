"""Send a workload to a cluster while its scenario is played."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import structlog

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.phases import phases_of
from resplit.scenario import ScenarioConfig
from resplit.workload import ScheduledRequest
from tasks.changes import play

_log = structlog.get_logger(__name__)
_PROGRESS_S = 10.0


@dataclass(frozen=True)
class Sent:
    """What the client saw: the start of the run (seconds since 1970), and the requests whose connection failed."""

    start_s: float
    offered: int
    failed_connections: tuple[ScheduledRequest, ...]


def send(
    cluster: Cluster,
    model: str,
    requests: list[ScheduledRequest],
    scenario: ScenarioConfig,
    start_s: float | None = None,
    streams: int = 0,
) -> Sent:
    """Send `requests` at their times while the scenario's changes are made. Returns when every request has ended.

    Times count from `start_s` (seconds since 1970), or from now. With `streams`, so many always wait for an answer
    until the scenario ends: the times of `requests` do not matter, and they are sent again and again.
    """
    with ControlClient(cluster.url, cluster.token) as control:
        return asyncio.run(_send(cluster, control, model, requests, scenario, start_s or time.time(), streams))


async def _send(
    cluster: Cluster,
    control: ControlClient,
    model: str,
    requests: list[ScheduledRequest],
    scenario: ScenarioConfig,
    start_s: float,
    streams: int,
) -> Sent:
    phases = phases_of(cluster.config, scenario)
    begun_s = time.monotonic() + start_s - time.time()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=180.0, limits=limits) as client:
        sender = _RequestSender(client, model, begun_s)
        reporting = asyncio.create_task(sender.report(len(requests)))
        changing = asyncio.create_task(play(control, cluster, phases, begun_s))
        again, until_s = itertools.cycle(requests), begun_s + scenario.duration
        sending = [sender.stream(again, until_s) for _ in range(streams)] or [sender.one(each) for each in requests]
        await asyncio.gather(changing, *sending)
        reporting.cancel()
    await _until(begun_s + scenario.duration)
    return Sent(start_s, sender.done, tuple(sender.failed))


@dataclass
class _RequestSender:
    """Sends requests, and counts those that have ended. `begun_s` is the start of the run on the monotonic clock."""

    client: httpx.AsyncClient
    model: str
    begun_s: float
    done: int = 0
    failed: list[ScheduledRequest] = field(default_factory=list)

    async def one(self, request: ScheduledRequest) -> None:
        """Send a request at its time."""
        await _until(self.begun_s + request.at_s)
        await self._send(request)

    async def stream(self, requests: Iterator[ScheduledRequest], until_s: float) -> None:
        """Send one request after another."""
        await _until(self.begun_s)
        while time.monotonic() < until_s:
            await self._send(next(requests))

    async def report(self, offered: int) -> None:
        """Log from time to time how many requests have ended."""
        while True:
            await asyncio.sleep(_PROGRESS_S)
            _log.info("serving", at_s=round(time.monotonic() - self.begun_s), done=self.done, of=offered)

    async def _send(self, request: ScheduledRequest) -> None:
        try:
            await _complete(self.client, self.model, request)
        except httpx.HTTPError as error:
            _log.warning("the connection of a request failed", error=repr(error))
            self.failed.append(request)
        self.done += 1


async def _complete(client: httpx.AsyncClient, model: str, request: ScheduledRequest) -> None:
    """One streamed completion. The gateway records its status, so the answer is read and dropped."""
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.new_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"X-Resplit-Class": request.request_class}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        async for _ in response.aiter_lines():
            pass


async def _until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))


def load_words(path: Path) -> list[str]:
    """Read the text from which prompts are cut, as words."""
    return path.read_text(encoding="utf-8").split()
