"""A controller that is killed comes back to what was live; a node that hangs is lost, and found when it wakes."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest
import torch

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.errors import NodeLostError
from resplit.security.identity import CONTROLLER
from tests.support.cluster import reference
from tests.support.streams import PROMPTS, stream
from tests.system.test_node_loss import NEW_TOKENS, until


async def answers_of(cluster: Cluster) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        return await asyncio.gather(*(stream(client, prompt, NEW_TOKENS) for prompt in PROMPTS))


@pytest.fixture(scope="module")
def expected(unsplit_model: torch.nn.Module) -> list[list[int]]:
    return [reference(unsplit_model, prompt, NEW_TOKENS) for prompt in PROMPTS]


async def test_a_restarted_controller_serves_what_was_live(cluster: Cluster, expected: list[list[int]]) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        before = client.model()
        cluster.processes[CONTROLLER].send_signal(signal.SIGKILL)
        cluster.processes[CONTROLLER].wait()
        start_process(cluster, CONTROLLER)
        await until(lambda: _ready(client))
        after = client.model()
        assert (after["placement"], after["epoch"]) == (before["placement"], before["epoch"] + 1)
        assert await answers_of(cluster) == expected
        await until(lambda: {node["sessions"] for node in client.status()["nodes"]} == {0})


async def test_a_node_that_hangs_is_replaced_and_wakes_up_harmless(cluster: Cluster, expected: list[list[int]]) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        placement = [*client.model()["placement"][:3], "gamma", *client.model()["placement"][4:]]
        client.propose({"placement": placement, "action": "re-split", "based_on": client.model()["epoch"]})

        async def freeze() -> None:
            await until(lambda: client.status()["sessions"] == len(PROMPTS))
            cluster.processes["gamma"].send_signal(signal.SIGSTOP)

        answers, _ = await asyncio.gather(answers_of(cluster), freeze())
        assert answers == expected
        assert "gamma" not in client.model()["placement"]
        cluster.processes["gamma"].send_signal(signal.SIGCONT)
        await until(lambda: "gamma" not in client.model()["lost"])
        assert await answers_of(cluster) == expected


def _ready(client: ControlClient) -> bool:
    try:
        return bool(client.status()["ready"] == "yes")
    except NodeLostError:
        return False
