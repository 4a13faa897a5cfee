"""A killed controller resumes the live placement. A node that hangs is lost, and is used again when it resumes."""

from __future__ import annotations

import asyncio
import signal

import pytest
import torch

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.epochs import Proposal
from resplit.security.identity import CONTROLLER
from tests.support.processes import poll_until, ready
from tests.support.streams import PROMPTS, all_answers, expected_tokens

pytestmark = pytest.mark.processes

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def expected(unsplit_model: torch.nn.Module) -> list[list[int]]:
    return expected_tokens(unsplit_model, NEW_TOKENS)


async def test_a_restarted_controller_serves_the_placement_that_was_live(
    cluster: Cluster, expected: list[list[int]]
) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        before = client.model()
        cluster.processes[CONTROLLER].send_signal(signal.SIGKILL)
        cluster.processes[CONTROLLER].wait()
        start_process(cluster, CONTROLLER)
        await poll_until(lambda: ready(client))
        after = client.model()
        assert (after.placement, after.epoch) == (before.placement, before.epoch + 1)
        assert await all_answers(cluster, NEW_TOKENS) == expected
        await poll_until(lambda: {node.sessions for node in client.status().nodes} == {0})


async def test_a_node_that_hangs_is_replaced_and_does_no_harm_when_it_resumes(
    cluster: Cluster, expected: list[list[int]]
) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        placement = (*client.model().placement[:3], "gamma", *client.model().placement[4:])
        client.propose(Proposal(placement, "re-split", client.model().epoch))

        async def freeze() -> None:
            await poll_until(lambda: client.status().sessions == len(PROMPTS))
            cluster.processes["gamma"].send_signal(signal.SIGSTOP)

        answers, _ = await asyncio.gather(all_answers(cluster, NEW_TOKENS), freeze())
        assert answers == expected
        assert "gamma" not in client.model().placement
        cluster.processes["gamma"].send_signal(signal.SIGCONT)
        await poll_until(lambda: "gamma" not in client.model().lost)
        assert await all_answers(cluster, NEW_TOKENS) == expected
