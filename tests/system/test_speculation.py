"""Over links of 20 ms, passes verify drafts: no token changes, even while the placement changes or a node is killed."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.epochs import Proposal
from tests.support.cluster import CLUSTER, random_placement, started
from tests.support.processes import poll_until
from tests.support.streams import PROMPTS, all_answers, expected_tokens

pytestmark = pytest.mark.processes

NEW_TOKENS = 64
FAR = CLUSTER + "links: {default: {latency: 20 ms, bandwidth: 100 Mbit/s}}\n"


@pytest.fixture
def far_cluster(tmp_path: Path, model_folder: Path) -> Iterator[Cluster]:
    """Four node processes, and one for gateway and controller, with a plan deployed."""
    with started(tmp_path, model_folder, FAR) as cluster:
        yield cluster


async def test_drafts_change_no_token_while_nodes_come_and_go(
    far_cluster: Cluster, unsplit_model: torch.nn.Module
) -> None:
    expected = expected_tokens(unsplit_model, NEW_TOKENS)
    with ControlClient(far_cluster.url, far_cluster.token) as client:
        blocks, rng = len(client.model().features), random.Random(4)

        async def act_in_the_middle(resplit: bool) -> None:
            await poll_until(lambda: client.status().sessions == len(PROMPTS))
            await asyncio.sleep(1.0)  # somewhere in the middle of the streams
            live = client.model()
            if resplit:
                proposal = Proposal(random_placement(blocks, rng), "re-split", live.epoch)
                await asyncio.to_thread(client.propose, proposal)
            else:
                far_cluster.processes[live.placement[4]].send_signal(signal.SIGKILL)

        for resplit in (True, False):
            live = client.model()  # a chain of four nodes
            client.propose(
                Proposal(("alpha", "beta", "beta", "gamma", "delta", "delta", "beta", "alpha"), "re-split", live.epoch)
            )
            answers, _ = await asyncio.gather(all_answers(far_cluster, NEW_TOKENS), act_in_the_middle(resplit))
            assert answers == expected
        records = client.records()
    assert sum(record.accepted for record in records) > 0  # how many, depends on how busy this machine is
    assert any(move.replayed for record in records for move in record.moves)
