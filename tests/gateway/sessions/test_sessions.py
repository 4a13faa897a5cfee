"""Sessions over real nodes on one event loop: right tokens, whoever computes them, and nothing left when they end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from resplit.config import ClusterConfig
from resplit.control.controller import Controller
from resplit.errors import CapacityError, NodeLostError, RequestError
from resplit.gateway.engine import GenerationRequest, Sampling
from resplit.gateway.sessions.manager import Sessions
from resplit.model.source import StoredModel
from tests.node.conftest import tiny
from tests.support.cluster import reference
from tests.support.node_cluster import InProcess, deploy, in_process, until
from tests.system.conftest import model_folder, whole

__all__ = ["model_folder", "tiny", "whole"]

A, B, C = "alpha", "beta", "gamma"
SPREAD = [A, A, B, B, C, C, B, A]
TOGETHER = [A] * 8
TURNED = [B, B, A, C, C, A, C, B]
PROMPT = (5, 17, 40, 200, 31, 8, 99)
KV_TOKENS = 256


def cluster_config(**more: object) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": A,
            "trusted": [A, B],
            "nodes": [{"name": name, "memory": "8 MiB"} for name in (A, B, C)],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "limits": {"context_tokens": KV_TOKENS, "sessions": 8, "queue": 4, "deadline": "20 s"},
            "kv_tokens": KV_TOKENS,
        }
        | more
    )


@pytest.fixture
async def nodes(tiny: StoredModel, tmp_path: Path) -> AsyncIterator[InProcess]:
    async with in_process(cluster_config(), tiny, tmp_path) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcess) -> AsyncIterator[Controller]:
    controller = nodes.controller()
    await controller.introduce()
    await deploy(controller, SPREAD)
    yield controller
    await controller.stop()


def request(new_tokens: int = 12, prompt: tuple[int, ...] = PROMPT, **more: object) -> GenerationRequest:
    plain = {"sampling": Sampling(), "request_class": "chat", "stop_ids": frozenset[int](), "deadline_s": None}
    return GenerationRequest(prompt, new_tokens, **plain | more)


async def tokens_of(sessions: Sessions, wanted: GenerationRequest) -> list[int]:
    return [token.token_id async for token in sessions.generate(wanted)]


async def assert_nothing_is_left(nodes: InProcess) -> None:
    """No session at the gateway and, once what was on its way has come through, no cache on any node."""
    assert nodes.sessions.state()["sessions"] == 0
    assert nodes.sessions.state()["waiting"] == 0
    await tokens_of(nodes.sessions, request(1))

    async def free() -> bool:
        return not any([(await nodes.state(name))["sessions"] for name in (A, B, C)])

    await until(free)
    # All of the room has come back, too: a session that needs it whole gets in at once.
    await tokens_of(nodes.sessions, request(1, (7,) * (KV_TOKENS - 1), deadline_s=5.0))


async def test_tokens_are_those_of_the_unsplit_model(
    nodes: InProcess, controller: Controller, whole: torch.nn.Module
) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT * 4]
    answers = await asyncio.gather(*(tokens_of(nodes.sessions, request(20, prompt)) for prompt in prompts))
    assert answers == [reference(whole, list(prompt), 20) for prompt in prompts]
    await assert_nothing_is_left(nodes)


async def test_activations_go_from_node_to_node_and_never_through_the_gateway(
    tiny: StoredModel, tmp_path: Path
) -> None:
    slow = {"default": {"latency": "10 ms", "bandwidth": "1 Gbit/s"}}  # slower than what a probe may be mistaken by
    async with in_process(cluster_config(links=slow), tiny, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.introduce()
        await deploy(controller, SPREAD)
        sent: Counter[str] = Counter()
        for peer in nodes.router.peers.values():
            peer.on_crossing = lambda crossing: sent.update([crossing.peer])
        await tokens_of(nodes.sessions, request(10))
        # The gateway sends one step for each token, to the first node. The nodes pass on all the others.
        assert sent == {A: 10}

        async def all_passed_on() -> bool:  # the last acknowledgement may come after the last token
            passed_on = {name: set(await passive_peers(nodes, name)) for name in (A, B, C)}
            return passed_on == {A: {B}, B: {C, A}, C: {B}}

        await until(all_passed_on)
        assert sent == {A: 10}
        await controller.stop()


async def passive_peers(nodes: InProcess, name: str) -> list[str]:
    return [row["peer"] for row in await nodes.rows(name, "links") if row["source"] == "passive"]


async def test_a_seed_draws_the_same_tokens_wherever_the_blocks_are(nodes: InProcess, controller: Controller) -> None:
    def drawn(seed: int) -> GenerationRequest:
        return request(16, sampling=Sampling(0.9, 0.95, seed))

    first = await tokens_of(nodes.sessions, drawn(7))
    assert await tokens_of(nodes.sessions, drawn(7)) == first
    assert await tokens_of(nodes.sessions, drawn(8)) != first
    assert await tokens_of(nodes.sessions, request(16)) != first
    for placement in (TOGETHER, TURNED):
        await deploy(controller, placement)
        assert await tokens_of(nodes.sessions, drawn(7)) == first


async def test_a_session_follows_the_live_epoch_and_the_old_one_is_freed(
    nodes: InProcess, controller: Controller, whole: torch.nn.Module
) -> None:
    generated = []
    async for token in nodes.sessions.generate(request(40)):
        generated.append(token.token_id)
        if token.index in (4, 20):
            await deploy(controller, TURNED if token.index == 4 else TOGETHER)
    assert generated == reference(whole, list(PROMPT), 40)
    assert nodes.sessions.records(0)[-1]["epochs"] == (1, 2, 3)

    async def only_the_last() -> bool:
        return [(await nodes.state(name))["blocks"] for name in (A, B, C)] == [list(range(8)), [], []]

    await until(only_the_last)
    await assert_nothing_is_left(nodes)


async def test_a_deadline_ends_a_session_and_frees_it(nodes: InProcess, controller: Controller) -> None:
    with pytest.raises(TimeoutError):
        await tokens_of(nodes.sessions, request(240, deadline_s=0.1))
    (record,) = nodes.sessions.records(0)
    assert record["status"] == 504
    assert record["new_tokens"] < 240
    await assert_nothing_is_left(nodes)


async def test_a_deadline_counts_while_waiting_in_line(nodes: InProcess, controller: Controller) -> None:
    hog = nodes.sessions.generate(request(KV_TOKENS - len(PROMPT)))
    await anext(hog)
    with pytest.raises(TimeoutError):
        await tokens_of(nodes.sessions, request(5, deadline_s=0.05))
    waiting = [asyncio.create_task(tokens_of(nodes.sessions, request(5))) for _ in range(4)]
    await asyncio.sleep(0)
    assert nodes.sessions.state()["waiting"] == 4
    with pytest.raises(CapacityError, match="4 requests wait already"):
        await tokens_of(nodes.sessions, request(5))
    await hog.aclose()
    answers = await asyncio.gather(*waiting)
    assert all(answer == answers[0] for answer in answers)
    assert [record["status"] for record in nodes.sessions.records(0)][:2] == [504, 429]
    await assert_nothing_is_left(nodes)


async def test_whoever_hangs_up_at_any_moment_leaves_nothing_behind(nodes: InProcess, controller: Controller) -> None:
    rng = random.Random(3)
    for _ in range(4):
        prompts = [tuple(rng.randrange(250) for _ in range(rng.choice([1, 8, 40]))) for _ in range(12)]
        streams = [asyncio.create_task(tokens_of(nodes.sessions, request(15, prompt))) for prompt in prompts]
        for stream in streams:
            await asyncio.sleep(rng.choice([0, 0.001, 0.003]))
            stream.cancel()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert any(isinstance(end, asyncio.CancelledError) for end in ends)
    await assert_nothing_is_left(nodes)


async def test_what_all_sessions_hold_stays_within_what_was_reserved(nodes: InProcess, controller: Controller) -> None:
    weights = {name: (await nodes.state(name))["held_bytes"] for name in (A, B, C)}
    per_token = nodes.features[2].kv_bytes_per_token
    layers = {A: 1, B: 3, C: 2}
    streams = [asyncio.create_task(tokens_of(nodes.sessions, request(20, (9,) * 40))) for _ in range(6)]
    most = 0.0
    while not all(stream.done() for stream in streams):
        await asyncio.sleep(0.01)
        for name in (A, B, C):
            state = await nodes.state(name)
            caches = state["held_bytes"] - state["copy_bytes"] - weights[name]
            assert state["held_bytes"] <= state["memory_bytes"]
            assert caches <= KV_TOKENS * layers[name] * per_token
            most = max(most, caches)
    assert most > 0
    assert len({tuple(stream.result()) for stream in streams}) == 1


async def test_a_request_that_can_never_be_served_is_refused(nodes: InProcess, controller: Controller) -> None:
    for prompt, new_tokens in [((), 5), (PROMPT, KV_TOKENS)]:
        with pytest.raises(RequestError, match="do not fit"):
            await tokens_of(nodes.sessions, request(new_tokens, prompt))
    await assert_nothing_is_left(nodes)


async def test_generation_ends_with_a_stop_token(nodes: InProcess, controller: Controller) -> None:
    every = await tokens_of(nodes.sessions, request(12))
    stop = every[5]
    tokens = [token async for token in nodes.sessions.generate(request(12, stop_ids=frozenset({stop})))]
    assert [token.token_id for token in tokens] == every[: every.index(stop) + 1]
    assert [token.finish for token in tokens] == [None] * every.index(stop) + ["stop"]


async def test_before_a_placement_is_deployed_nothing_is_served(nodes: InProcess) -> None:
    assert nodes.sessions.ready() == "no placement is deployed yet"
    with pytest.raises(NodeLostError, match="no placement"):
        await tokens_of(nodes.sessions, request())


async def test_demand_is_what_was_declared_until_something_is_seen(nodes: InProcess, controller: Controller) -> None:
    (declared,) = nodes.sessions.demand(10.0)
    assert (declared["name"], declared["source"], declared["prompt_tokens"], declared["new_tokens"]) == (
        "chat",
        A,
        8,
        8,
    )
    for _ in range(10):
        await tokens_of(nodes.sessions, request(2, (3,) * 20))
    (seen,) = nodes.sessions.demand(10.0)
    # Ten requests seen weigh as much as ten seconds at one a second declared.
    assert seen["prompt_tokens"] == pytest.approx((20 + 8) / 2)
    assert seen["new_tokens"] == pytest.approx((2 + 8) / 2)
    assert seen["rate_rps"] == pytest.approx(20 / 20)


async def test_a_lost_nodes_sessions_are_replayed_on_the_next_placement_token_for_token(
    nodes: InProcess, controller: Controller, whole: torch.nn.Module
) -> None:
    nodes.sessions.on_lost = lambda node: None  # the test is the one that plans
    generated = []
    async for token in nodes.sessions.generate(request(30)):
        generated.append(token.token_id)
        if token.index == 10:
            await nodes.stop(C)
            replacing = asyncio.create_task(deploy(controller, [A, A, B, B, A, B, A, A]))
    await replacing
    assert generated == reference(whole, list(PROMPT), 30)
    (record,) = nodes.sessions.records(0)
    assert (record["status"], record["epochs"]) == (200, (1, 2))


async def test_where_no_placement_is_left_requests_fail_with_the_reason_until_the_node_is_back(
    nodes: InProcess, controller: Controller
) -> None:
    before = await tokens_of(nodes.sessions, request())
    stream = nodes.sessions.generate(request(200))
    await anext(stream)
    await nodes.stop(C)
    with pytest.raises(NodeLostError, match=f"{C} lost, and nothing known yet"):
        await exhaust(stream)
    assert nodes.sessions.records(0)[-1]["status"] == 503

    async def free() -> bool:
        return not any([(await nodes.state(name))["sessions"] for name in (A, B)])

    await until(free)
    await nodes.start(C)

    async def ready() -> bool:
        return nodes.sessions.ready() is None

    await until(ready)
    assert await tokens_of(nodes.sessions, request()) == before


async def exhaust(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def test_a_deadline_counts_while_a_lost_node_is_waited_for(nodes: InProcess, controller: Controller) -> None:
    nodes.sessions.on_lost = lambda node: None
    await nodes.stop(C)

    async def noticed() -> bool:
        return nodes.sessions.ready() is not None

    await until(noticed)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(tokens_of(nodes.sessions, request(deadline_s=0.1)), 5)
    assert nodes.sessions.records(0)[-1]["status"] == 504
