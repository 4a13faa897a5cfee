"""Sessions whose passes wait at a slow node take the new route at once, with the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from resplit.model.source import StoredModel
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import A, B, C, generate, generation_request, three_node_config

SLOW_LAYER_S = 0.1
WITH_C = [A, A, B, B, C, C, A, A]
WITHOUT_C = [A, A, B, B, B, B, A, A]


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """Three nodes; gamma needs 0.2 s for its two layers."""
    alone = {"fixed": "0 s", "per_session": f"{SLOW_LAYER_S} s"}  # so sessions wait for each other
    times = {"embed": "0 ms", "layer": alone, "head": "0 ms"}
    emulate = {"decode_per_token": times, "prefill_per_token": dict.fromkeys(times, "0 ms")}
    described = [{"name": name, "memory": "8 MiB"} | ({"emulate": emulate} if name == C else {}) for name in (A, B, C)]
    links = {"default": {"latency": "1 ms", "bandwidth": "1 Gbit/s"}}
    async with in_process(three_node_config(nodes=described, links=links), stored_model, tmp_path) as running:
        yield running


@pytest.mark.parametrize("staged", [False, True])
async def test_passes_that_wait_at_a_slow_node_take_the_new_route_and_no_token_changes(
    nodes: InProcessCluster, staged: bool
) -> None:
    controller = nodes.controller()
    await controller.membership.introduce()
    await deploy(controller, WITHOUT_C)
    requests = [generation_request(4, prompt=(5, 17, 40 + number)) for number in range(5)]
    expected = [await generate(nodes.sessions, request) for request in requests]
    await deploy(controller, WITH_C)
    running = [asyncio.create_task(generate(nodes.sessions, request)) for request in requests]
    sessions = nodes.sessions._live

    async def all_decode() -> bool:  # a batch runs at gamma, and others wait there for 0.2 s each
        return len(sessions) == 5 and all(session.position >= 3 for session in sessions.values())

    await until(all_decode)
    if staged:
        async with controller.deployment._paused(epoch=99):  # what waits is given back, so that this comes soon
            assert sum(session.recalls for session in sessions.values()) >= 2
    else:
        await deploy(controller, WITHOUT_C)
        await controller.deployment.recall([C])
    assert await asyncio.gather(*running) == expected
    recalls = [record.recalls for record in nodes.sessions.records(len(requests))]
    assert sum(recalls) >= 2
    assert max(recalls) == 1
    await controller.stop()
