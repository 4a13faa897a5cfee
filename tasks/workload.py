"""A workload fixed by a seed, and the client that sends it while the cluster changes on schedule."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import structlog

from resplit.cluster.client import ControlClient
from resplit.config import ClusterConfig, LinkShape, ScenarioConfig

_log = structlog.get_logger(__name__)
_PROGRESS_S = 10.0
_TOKENS_PER_WORD = 1.35  # of plain English in the usual vocabularies; only the mean length depends on it


@dataclass(frozen=True)
class ScheduledRequest:
    """One request of a workload; `at_s` counts from the start."""

    at_s: float
    request_class: str
    prompt: str
    new_tokens: int


def workload(cluster: ClusterConfig, scenario: ScenarioConfig, seed: int, words: list[str]) -> list[ScheduledRequest]:
    """All arrivals, in order: Poisson for each class at the rate of the moment, lengths within half of their mean.

    The same seed gives the same arrivals, prompts and lengths, whatever happens in the run.
    """
    arrivals = []
    for index, declared in enumerate(cluster.classes):
        rng = np.random.default_rng((seed, index))
        rates = _rates(declared.name, declared.rate_rps, scenario)
        for at_s in _poisson(rates, scenario.duration, rng):
            prompt_words = max(1, int(declared.prompt_tokens * rng.uniform(0.5, 1.5) / _TOKENS_PER_WORD))
            first = int(rng.integers(0, max(1, len(words) - prompt_words)))
            new_tokens = max(1, round(declared.new_tokens * rng.uniform(0.75, 1.25)))
            arrivals.append(
                ScheduledRequest(at_s, declared.name, " ".join(words[first : first + prompt_words]), new_tokens)
            )
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _rates(name: str, rate_rps: float, scenario: ScenarioConfig) -> list[tuple[float, float]]:
    """(from when, rate) of a class, in order."""
    changes = sorted((change.at, change.rate_rps) for change in scenario.load if change.request_class == name)
    return [(0.0, rate_rps), *changes]


def _poisson(rates: list[tuple[float, float]], duration_s: float, rng: np.random.Generator) -> Iterable[float]:
    """Moments of a Poisson process whose rate changes at given moments: unit-rate moments, time-warped."""
    ends = [start_s for start_s, _ in rates[1:]] + [duration_s]
    due = rng.exponential()
    for (start_s, rate_rps), end_s in zip(rates, ends, strict=True):
        at_s = start_s
        while rate_rps > 0 and at_s + due / rate_rps < end_s:
            at_s += due / rate_rps
            yield at_s
            due = rng.exponential()
        due -= max(0.0, end_s - at_s) * rate_rps


@dataclass(frozen=True)
class Sent:
    """What the client saw: when the run began (seconds since 1970), and requests whose connection failed."""

    start_s: float
    offered: int
    broken: tuple[ScheduledRequest, ...]


def send(url: str, token: str, model: str, arrivals: list[ScheduledRequest], scenario: ScenarioConfig) -> Sent:
    """Send a workload while the scenario's changes are made at their moments; returns when every request has ended."""
    with ControlClient(url, token) as control:
        return asyncio.run(_send(url, control, model, arrivals, scenario))


async def _send(
    url: str, control: ControlClient, model: str, arrivals: list[ScheduledRequest], scenario: ScenarioConfig
) -> Sent:
    start_s, begun_s = time.time(), time.monotonic()
    broken: list[ScheduledRequest] = []
    done = 0

    async def one(client: httpx.AsyncClient, arrival: ScheduledRequest) -> None:
        nonlocal done
        await _until(begun_s + arrival.at_s)
        try:
            await _ask(client, model, arrival)
        except httpx.HTTPError as error:
            _log.warning("a request's connection failed", error=repr(error))
            broken.append(arrival)
        done += 1

    async def progress() -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            _log.info("serving", at_s=round(time.monotonic() - begun_s), done=done, of=len(arrivals))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=180.0, limits=limits) as client:
        reporting = asyncio.create_task(progress())
        changing = asyncio.create_task(_change(control, scenario, begun_s))
        await asyncio.gather(changing, *(one(client, arrival) for arrival in arrivals))
        reporting.cancel()
    await _until(begun_s + scenario.duration)
    return Sent(start_s, len(arrivals), tuple(broken))


async def _ask(client: httpx.AsyncClient, model: str, arrival: ScheduledRequest) -> None:
    """One streamed completion; statuses other than 200 are in the gateway's own record."""
    body = {
        "model": model,
        "prompt": arrival.prompt,
        "max_tokens": arrival.new_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"X-Resplit-Class": arrival.request_class}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        async for _ in response.aiter_lines():
            pass


async def _change(control: ControlClient, scenario: ScenarioConfig, begun_s: float) -> None:
    """Make the scenario's changes of nodes and links, each at its moment."""
    changes = sorted([*scenario.nodes, *scenario.links], key=lambda change: change.at)
    for change in changes:
        await _until(begun_s + change.at)
        _log.info("change", label=change.label)
        if isinstance(change, LinkShape):
            await asyncio.to_thread(control.emulate_link, _link_body(change.between, change))
        else:
            body = {"node": change.node, "slowdown": change.slowdown}
            body["background_utilization"] = change.background_utilization
            await asyncio.to_thread(control.emulate_node, body)


def reset(control: ControlClient, cluster: ClusterConfig, scenario: ScenarioConfig) -> None:
    """Undo what a scenario changes: every node and link as the cluster file declares it."""
    for node in {change.node for change in scenario.nodes}:
        declared = cluster.node(node).emulate
        assert declared is not None
        body = {"node": node, "slowdown": 1.0, "background_utilization": declared.background_utilization}
        control.emulate_node(body)
    for change in scenario.links:
        shape = cluster.link(*change.between)
        assert shape is not None
        control.emulate_link(_link_body(change.between, shape))


def _link_body(between: tuple[str, str], shape: LinkShape) -> dict[str, object]:
    return {"between": list(between), "latency_s": shape.latency, "bandwidth_bytes_per_s": shape.bandwidth}


async def _until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))


def load_words(path: Path) -> list[str]:
    """The words that prompts are cut from."""
    return path.read_text(encoding="utf-8").split()
