"""Idle connections of strangers to every port, while requests come over new connections."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.chaos.findings import Finding, quantile, spread
from benchmarks.chaos.resources import MAX_GROWTH_HANDLES, ResourceUsage
from resplit.cluster.local import Cluster
from resplit.wire.addresses import Address
from resplit.wire.listener import IDLE_S
from tests.support.cluster import load_unsplit, make_model, started
from tests.support.processes import poll_until
from tests.support.streams import PROMPTS, StreamFailedError, expected_tokens, stream

CONNECTIONS = 2000  # to each port
REQUESTS = 60
NEW_TOKENS = 16
_AT_ONCE = 100  # connections that one port is asked for at the same time
_WITHIN_S = 30.0


@dataclass
class Requests:
    """The outcomes of requests, each over a connection of its own, and the latencies of those that were answered."""

    latencies_s: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """The number of requests."""
        return len(self.latencies_s) + len(self.failed)

    async def send(self, cluster: Cluster, expected: list[list[int]], number: int) -> None:
        """Send requests one after another."""
        for index in range(number):
            lane = index % len(PROMPTS)
            begun_s = time.monotonic()
            try:
                async with httpx.AsyncClient(base_url=cluster.url, timeout=_WITHIN_S) as client:
                    tokens = await stream(client, PROMPTS[lane], NEW_TOKENS)
            except (httpx.HTTPError, StreamFailedError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                continue
            self.latencies_s.append(time.monotonic() - begun_s)
            self.wrong += tokens != expected[lane]


@contextlib.asynccontextmanager
async def idle_connections(addresses: list[Address], number: int) -> AsyncIterator[asyncio.Event]:
    """Open `number` connections to each address and keep this end of them open. The event is set once all were open."""
    opened, done = contextlib.ExitStack(), asyncio.Event()

    async def connect(address: Address, turn: asyncio.Semaphore) -> None:
        async with turn:
            with contextlib.suppress(OSError):  # a refusal is no failure of the experiment
                _, writer = await asyncio.open_connection(address.host, address.port)
                opened.callback(writer.transport.abort)

    async def connect_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for address in addresses:
                turn = asyncio.Semaphore(_AT_ONCE)
                for _ in range(number):
                    tasks.create_task(connect(address, turn))
        done.set()

    with opened:
        connecting = asyncio.create_task(connect_all())
        try:
            yield done
        finally:
            await connecting


async def run(scale: float, folder: Path) -> list[Finding]:
    """2,000 connections to each of five ports, twice: what the first time leaves in memory, the second time uses again.

    Requests are sent before, while the connections are opened, and while they idle.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    number, requests = round(CONNECTIONS * scale), max(8, round(REQUESTS * scale))
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS)
    before, during, usage, peak = Requests(), Requests(), ResourceUsage(), dict[str, int]()
    with started(folder, model) as cluster:
        await before.send(cluster, expected, requests)
        at_first = handles(cluster)
        for turn in (1, 2):
            async with idle_connections(ports(cluster), number) as all_open:
                while not all_open.is_set() or during.sent < turn * requests:
                    await during.send(cluster, expected, 1)
                    peak = {name: max(now, peak.get(name, 0)) for name, now in handles(cluster).items()}
            await _until_handles_are_back(cluster, at_first)
            usage.sample(cluster)
        dead = cluster.dead()
    return [*_findings(number, before, during), _peak(peak), _ended(dead), *usage.findings("idle_connections")]


def ports(cluster: Cluster) -> list[Address]:
    """The ports of the gateway and of every node."""
    gateway = Address.parse(cluster.url.removeprefix("http://"))
    return [gateway, *(Address.parse(str(node.address)) for node in cluster.config.nodes)]


def handles(cluster: Cluster) -> dict[str, int]:
    """The open descriptors of each process."""
    return {name: psutil.Process(process.pid).num_fds() for name, process in cluster.processes.items()}


async def _until_handles_are_back(cluster: Cluster, at_first: dict[str, int]) -> None:
    """TimeoutError if some process keeps more descriptors than it had."""
    await poll_until(
        lambda: all(now <= at_first[name] + MAX_GROWTH_HANDLES for name, now in handles(cluster).items()), 2 * IDLE_S
    )


def _findings(number: int, before: Requests, during: Requests) -> list[Finding]:
    first = f" ({during.failed[0]})" if during.failed else ""
    ratio = quantile(during.latencies_s, 0.5) / quantile(before.latencies_s, 0.5)
    what = f"beside {number} idle connections to each port"
    return [
        Finding(
            "idle_connections",
            f"requests without an answer, {what}",
            f"{len(during.failed)} of {during.sent}{first}",
            "0",
            met=not during.failed,
        ),
        Finding(
            "idle_connections",
            "requests with a wrong token",
            f"{during.wrong} of {during.sent}",
            "0",
            met=during.wrong == 0,
        ),
        Finding("idle_connections", "latency of a request before", spread(before.latencies_s)),
        Finding("idle_connections", f"latency of a request {what}", spread(during.latencies_s)),
        Finding("idle_connections", "median latency relative to before", f"{ratio:.2f}"),
    ]


def _peak(peak: dict[str, int]) -> Finding:
    name = max(peak, key=lambda each: peak[each])
    return Finding("idle_connections", "open descriptors beside them, the process with most", f"{peak[name]} ({name})")


def _ended(dead: list[str]) -> Finding:
    return Finding("idle_connections", "processes that ended", ", ".join(dead) or "none", "none", met=not dead)
