"""The placement changes under running streams: every token is the unsplit model's, and no stream fails."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest
import torch

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.epochs import Proposal
from tests.support.cluster import random_placement
from tests.support.streams import PROMPTS, all_answers, expected_tokens

pytestmark = pytest.mark.processes

NEW_TOKENS = 48


async def keep_resplitting(cluster: Cluster, until: asyncio.Event, least: int) -> int:
    """Deploy random placements one after another until `until` is set, and at least `least` of them."""
    rng, done = random.Random(5), 0
    with ControlClient(cluster.url, cluster.token) as client:
        blocks = len(client.model().features)
        while not until.is_set() or done < least:
            live = await asyncio.to_thread(client.model)
            proposal = Proposal(random_placement(blocks, rng), "re-split", live.epoch)
            await asyncio.to_thread(client.propose, proposal)
            done += 1
    return done


async def test_streams_survive_one_resplit_after_another(cluster: Cluster, unsplit_model: torch.nn.Module) -> None:
    expected = expected_tokens(unsplit_model, NEW_TOKENS)
    finished = asyncio.Event()
    with ControlClient(cluster.url, cluster.token) as client:
        earlier = len(client.records())

    async def streams() -> list[list[int]]:
        rounds = [await all_answers(cluster, NEW_TOKENS) for _ in range(2)]
        finished.set()
        return [tokens for each in rounds for tokens in each]

    answers, resplits = await asyncio.gather(streams(), keep_resplitting(cluster, finished, 10))
    assert answers == expected * 2
    assert resplits >= 10
    with ControlClient(cluster.url, cluster.token) as client:
        moves = sum(len(record.moves) for record in client.records(earlier))
        state = client.status()
    assert moves > 0
    assert state.sessions == 0


async def test_a_full_cluster_answers_429_with_a_time_to_retry(cluster: Cluster) -> None:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        body = {"model": "tiny-llama", "prompt": PROMPTS[0], "max_tokens": 24, "ignore_eos": True}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(40)))
    codes = [answer.status_code for answer in answers]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert set(codes) == {200, 429}
    assert all(float(answer.headers["Retry-After"]) > 0 for answer in refused)


async def test_a_forbidden_or_outdated_placement_is_refused_and_changes_nothing(cluster: Cluster) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        before = client.model()
        good = before.placement
        for placement, based_on, why in [
            (("gamma", *good[1:]), before.epoch, "embed is private and gamma is not trusted"),
            (("nobody", *good[1:]), before.epoch, "no node is called 'nobody'"),
            (good[:-1], before.epoch, "7 blocks placed"),
            (good, before.epoch - 1, "plan again"),
        ]:
            with pytest.raises(Exception, match=why):
                client.propose(Proposal(placement, "re-split", based_on))
        assert client.model().epoch == before.epoch
