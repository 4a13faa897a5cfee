"""A node is killed while it serves: every stream continues with the right tokens, and service resumes by itself."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest
import torch

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, start_process
from resplit.epochs import Proposal
from tests.support.processes import answering, poll_until
from tests.support.streams import PROMPTS, all_answers, expected_tokens

pytestmark = pytest.mark.processes

NEW_TOKENS = 64


async def streams_with_a_kill(cluster: Cluster, victim: str) -> list[list[int]]:
    """The answers of eight streams, in the middle of which the victim is killed."""

    async def kill() -> None:
        with ControlClient(cluster.url, cluster.token) as client:
            await poll_until(lambda: client.status().sessions == len(PROMPTS))
        await asyncio.sleep(0.15)  # somewhere in the middle of the streams
        cluster.processes[victim].send_signal(signal.SIGKILL)

    answers, _ = await asyncio.gather(all_answers(cluster, NEW_TOKENS), kill())
    return answers


async def test_no_stream_fails_and_no_token_changes_when_a_node_is_killed(
    cluster: Cluster, unsplit_model: torch.nn.Module
) -> None:
    expected = expected_tokens(unsplit_model, NEW_TOKENS)
    with ControlClient(cluster.url, cluster.token) as client:
        earlier, skip = client.last_decision(), len(client.records())
        for victim in ("gamma", "beta"):
            before = client.model()
            spread = _using(before.placement, victim)
            client.propose(Proposal(spread, "re-split", before.epoch))
            assert await streams_with_a_kill(cluster, victim) == expected
            await poll_until(lambda victim=victim: victim not in client.model().placement)
            start_process(cluster, victim)
            await poll_until(lambda victim=victim: answering(client, victim))
        recoveries = [decision.outcome for decision in client.decisions(earlier) if decision.action == "recover"]
        lost = [(record, move.recovery) for record in client.records(skip) for move in record.moves if move.replayed]
        limits = cluster.config.limits
    assert len(recoveries) >= 2  # on a busy machine a node may also be lost for its silence
    assert any(how.restored_positions > 0 for _, how in lost)
    assert sum(each.sessions.sessions for each in recoveries if each and each.sessions) == len(lost)
    for record, how in lost:
        # At most the positions between two replicas, those added while they were sent, and the drafts of two passes.
        never_copied = record.prompt_tokens if how.restored_positions == 0 else 0
        assert how.replayed_positions <= never_copied + limits.copy_every + 2 * record.copy_lag + 2 * limits.drafts


def test_without_enough_nodes_requests_get_503_until_a_node_returns(cluster: Cluster) -> None:
    with ControlClient(cluster.url, cluster.token) as client:
        for victim in ("alpha", "beta"):  # the only trusted nodes, so private blocks have no place
            os.kill(cluster.processes[victim].pid, signal.SIGKILL)
        asyncio.run(poll_until(lambda: "no placement" in client.status().ready))
        body = {"model": "tiny-llama", "prompt": "a", "max_tokens": 2}
        refused = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=90)
        assert refused.status_code == 503
        assert "without alpha, beta" in refused.json()["error"]["message"]
        start_process(cluster, "alpha")
        asyncio.run(poll_until(lambda: client.status().ready == "yes"))
        assert httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=90).status_code == 200
        trusted = {"alpha", "beta"}
        assert {client.model().placement[block] for block in (0, 1, -1)} <= trusted


def _using(placement: tuple[str, ...], victim: str) -> tuple[str, ...]:
    """The placement with a middle block on `victim`."""
    return (*placement[:3], victim, *placement[4:])
