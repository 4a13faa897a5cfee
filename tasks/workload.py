"""Send a workload to a cluster, and make the changes of its scenario on schedule."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import structlog

from resplit.cluster.client import ControlClient
from resplit.config import ClusterConfig, LinkChange, LinkShape, NodeChange, ScenarioConfig
from resplit.workload import ScheduledRequest

_log = structlog.get_logger(__name__)
_PROGRESS_S = 10.0


@dataclass(frozen=True)
class Sent:
    """What the client saw: the start of the run (seconds since 1970), and the requests whose connection failed."""

    start_s: float
    offered: int
    failed_connections: tuple[ScheduledRequest, ...]


def send(url: str, token: str, model: str, requests: list[ScheduledRequest], scenario: ScenarioConfig) -> Sent:
    """Send `requests` at their times while the scenario's changes are made. Returns when every request has ended."""
    with ControlClient(url, token) as control:
        return asyncio.run(_send(url, control, model, requests, scenario))


async def _send(
    url: str, control: ControlClient, model: str, requests: list[ScheduledRequest], scenario: ScenarioConfig
) -> Sent:
    start_s, begun_s = time.time(), time.monotonic()
    failed: list[ScheduledRequest] = []
    done = 0

    async def one(client: httpx.AsyncClient, request: ScheduledRequest) -> None:
        nonlocal done
        await _until(begun_s + request.at_s)
        try:
            await _complete(client, model, request)
        except httpx.HTTPError as error:
            _log.warning("the connection of a request failed", error=repr(error))
            failed.append(request)
        done += 1

    async def progress() -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            _log.info("serving", at_s=round(time.monotonic() - begun_s), done=done, of=len(requests))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=180.0, limits=limits) as client:
        reporting = asyncio.create_task(progress())
        changing = asyncio.create_task(_change(control, scenario, begun_s))
        await asyncio.gather(changing, *(one(client, request) for request in requests))
        reporting.cancel()
    await _until(begun_s + scenario.duration)
    return Sent(start_s, len(requests), tuple(failed))


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


async def _change(control: ControlClient, scenario: ScenarioConfig, begun_s: float) -> None:
    """Make the scenario's changes of nodes and links, each at its time."""
    changes: list[NodeChange | LinkChange] = [*scenario.nodes, *scenario.links]
    for change in sorted(changes, key=lambda change: change.at):
        await _until(begun_s + change.at)
        _log.info("scenario change", label=change.label)
        if isinstance(change, LinkChange):
            await asyncio.to_thread(control.emulate_link, _link_body(change.between, change))
        else:
            body = {
                "node": change.node,
                "slowdown": change.slowdown,
                "background_utilization": change.background_utilization,
            }
            await asyncio.to_thread(control.emulate_node, body)


def reset(control: ControlClient, cluster: ClusterConfig, scenario: ScenarioConfig) -> None:
    """Set every node and link that a scenario changes back to the values that the cluster file declares."""
    for node in {change.node for change in scenario.nodes}:
        declared = cluster.node(node).emulate
        assert declared is not None
        body = {"node": node, "slowdown": 1.0, "background_utilization": declared.background_utilization}
        control.emulate_node(body)
    for link in scenario.links:
        shape = cluster.link(*link.between)
        assert shape is not None
        control.emulate_link(_link_body(link.between, shape))


def _link_body(between: tuple[str, str], shape: LinkShape) -> dict[str, object]:
    return {"between": list(between), "latency_s": shape.latency, "bandwidth_bytes_per_s": shape.bandwidth}


async def _until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))


def load_words(path: Path) -> list[str]:
    """Read the text from which prompts are cut, as words."""
    return path.read_text(encoding="utf-8").split()
