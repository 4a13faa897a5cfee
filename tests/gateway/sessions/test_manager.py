"""Sessions over real nodes on one event loop: their tokens are right, and they leave nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from resplit.control.controller import Controller
from resplit.errors import CapacityError, NodeLostError, RequestError
from resplit.gateway.engine import GenerationRequest, Sampling
from resplit.model.source import StoredModel
from resplit.wire.node_pb2 import Step
from resplit.wire.peers import Peer
from tests.support.cluster import reference
from tests.support.controllers import running_controller
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import (
    KV_TOKENS,
    PROMPT,
    SPREAD,
    TURNED,
    A,
    B,
    C,
    generate,
    generation_request,
    three_node_config,
)

TOGETHER = [A] * 8


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    async with in_process(three_node_config(), stored_model, tmp_path) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcessCluster) -> AsyncIterator[Controller]:
    async with running_controller(nodes, SPREAD) as controller:
        yield controller


async def assert_nothing_is_left(nodes: InProcessCluster) -> None:
    """The gateway has no session and, once all messages have arrived, no node has a cache."""
    assert nodes.sessions.status().sessions == 0
    assert nodes.sessions.status().waiting == 0
    await generate(nodes.sessions, generation_request(1))

    async def free() -> bool:
        return not any([(await nodes.state(name)).sessions for name in (A, B, C)])

    await until(free)
    # All reservations are free again: a session that needs all tokens is admitted at once.
    await generate(nodes.sessions, generation_request(1, (7,) * (KV_TOKENS - 1), deadline_s=5.0))


async def test_tokens_are_those_of_the_unsplit_model(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT * 4]
    answers = await asyncio.gather(*(generate(nodes.sessions, generation_request(20, prompt)) for prompt in prompts))
    assert answers == [reference(unsplit_model, list(prompt), 20) for prompt in prompts]
    await assert_nothing_is_left(nodes)


async def test_activations_go_from_node_to_node_and_never_through_the_gateway(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    slow = {"default": {"latency": "10 ms", "bandwidth": "1 Gbit/s"}}  # more than the error of a probe
    limits = {"context_tokens": KV_TOKENS, "drafts": 0}  # so that each token takes a pass
    async with in_process(three_node_config(links=slow, limits=limits), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.membership.introduce()
        await deploy(controller, SPREAD)
        sent: Counter[str] = Counter()
        for peer in nodes.router.peers.values():
            peer.send = counted(peer, sent)
        await generate(nodes.sessions, generation_request(10))
        # The gateway sends steps to the first node, at most one for each token, and permits to the others. The nodes
        # pass on all other steps.
        assert (sent.keys(), sent[B], sent[C]) == ({A, B, C}, 1, 1)
        assert sent[A] <= 10

        async def all_passed_on() -> bool:  # the last acknowledgement may come after the last token
            passed_on = {name: set(await passive_peers(nodes, name)) for name in (A, B, C)}
            return passed_on == {A: {B}, B: {C, A}, C: {B}}

        await until(all_passed_on)
        await controller.stop()


def counted(peer: Peer, sent: Counter[str]) -> Callable[[Step], None]:
    """`peer.send`, with each call counted in `sent`."""
    send = peer.send

    def send_counted(step: Step) -> None:
        sent[peer.name] += 1
        send(step)

    return send_counted


async def passive_peers(nodes: InProcessCluster, name: str) -> list[str]:
    return [row["peer"] for row in await nodes.rows(name, "links") if row["source"] == "passive"]


async def test_a_seed_gives_the_same_tokens_under_every_placement(
    nodes: InProcessCluster, controller: Controller
) -> None:
    def drawn(seed: int) -> GenerationRequest:
        return generation_request(16, sampling=Sampling(0.9, 0.95, seed))

    first = await generate(nodes.sessions, drawn(7))
    assert await generate(nodes.sessions, drawn(7)) == first
    assert await generate(nodes.sessions, drawn(8)) != first
    assert await generate(nodes.sessions, generation_request(16)) != first
    for placement in (TOGETHER, TURNED):
        await deploy(controller, placement)
        assert await generate(nodes.sessions, drawn(7)) == first


async def test_a_session_follows_the_live_epoch_and_the_old_one_is_freed(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    generated = []
    async for token in nodes.sessions.generate(generation_request(120)):
        generated.append(token.token_id)
        if token.index in (4, 20):
            await deploy(controller, TURNED if token.index == 4 else TOGETHER)
    assert generated == reference(unsplit_model, list(PROMPT), 120)
    assert nodes.sessions.records(0)[-1].epochs == (1, 2, 3)

    async def only_the_last() -> bool:
        return [(await nodes.state(name)).blocks for name in (A, B, C)] == [tuple(range(8)), (), ()]

    await until(only_the_last)
    await assert_nothing_is_left(nodes)


async def test_a_deadline_ends_a_session_and_frees_it(nodes: InProcessCluster, controller: Controller) -> None:
    with pytest.raises(TimeoutError):
        await generate(nodes.sessions, generation_request(240, deadline_s=0.1))
    (record,) = nodes.sessions.records(0)
    assert record.status == 504
    assert record.new_tokens < 240
    await assert_nothing_is_left(nodes)


async def test_a_deadline_may_end_an_answer_that_names_no_limit(
    nodes: InProcessCluster, controller: Controller
) -> None:
    made = await generate(nodes.sessions, generation_request(240, deadline_s=0.3, until_deadline=True))
    (record,) = nodes.sessions.records(0)
    assert (record.status, record.new_tokens) == (200, len(made))
    assert 0 < len(made) < 240
    await assert_nothing_is_left(nodes)
    with pytest.raises(TimeoutError):  # nothing exists yet
        await generate(nodes.sessions, generation_request(240, deadline_s=0.0, until_deadline=True))


async def test_the_usual_limit_is_what_the_class_expects_and_the_deadline_allows(
    nodes: InProcessCluster, controller: Controller
) -> None:
    expected = 4 * nodes.config.classes[0].new_tokens
    assert nodes.sessions.usual_tokens("chat", len(PROMPT), 60.0) == expected
    await generate(nodes.sessions, generation_request(20))
    assert nodes.sessions.usual_tokens("chat", len(PROMPT), 60.0) == expected
    assert nodes.sessions.usual_tokens("chat", len(PROMPT), 0.001) == 1


async def test_a_deadline_counts_while_a_request_is_queued(nodes: InProcessCluster, controller: Controller) -> None:
    first = nodes.sessions.generate(generation_request(8, (7,) * (KV_TOKENS - 8)))
    await anext(first)
    with pytest.raises(TimeoutError):
        await generate(nodes.sessions, generation_request(5, deadline_s=0.05))
    waiting = [asyncio.create_task(generate(nodes.sessions, generation_request(5))) for _ in range(4)]
    await asyncio.sleep(0)
    assert nodes.sessions.status().waiting == 4
    with pytest.raises(CapacityError, match="4 requests wait already"):
        await generate(nodes.sessions, generation_request(5))
    await first.aclose()
    answers = await asyncio.gather(*waiting)
    assert all(answer == answers[0] for answer in answers)
    assert [record.status for record in nodes.sessions.records(0)][:2] == [504, 429]
    await assert_nothing_is_left(nodes)


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    nodes: InProcessCluster, controller: Controller
) -> None:
    rng = random.Random(3)
    for _ in range(4):
        prompts = [tuple(rng.randrange(250) for _ in range(rng.choice([1, 8, 40]))) for _ in range(12)]
        streams = [asyncio.create_task(generate(nodes.sessions, generation_request(15, prompt))) for prompt in prompts]
        for stream in streams:
            await asyncio.sleep(rng.choice([0, 0.001, 0.003]))
            stream.cancel()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert any(isinstance(end, asyncio.CancelledError) for end in ends)
    await assert_nothing_is_left(nodes)


async def test_the_caches_of_all_sessions_stay_within_their_reservations(
    nodes: InProcessCluster, controller: Controller
) -> None:
    weights = {name: (await nodes.state(name)).held_bytes for name in (A, B, C)}
    per_token = nodes.features[2].kv_bytes_per_token
    layers = {A: 1, B: 3, C: 2}
    streams = [asyncio.create_task(generate(nodes.sessions, generation_request(20, (9,) * 40))) for _ in range(6)]
    most = 0.0
    while not all(stream.done() for stream in streams):
        await asyncio.sleep(0.01)
        for name in (A, B, C):
            state = await nodes.state(name)
            caches = state.held_bytes - state.copy_bytes - weights[name]
            assert state.held_bytes <= state.memory_bytes
            assert caches <= KV_TOKENS * layers[name] * per_token
            most = max(most, caches)
    assert most > 0
    assert len({tuple(stream.result()) for stream in streams}) == 1


async def test_a_request_that_can_never_be_served_is_refused(nodes: InProcessCluster, controller: Controller) -> None:
    for prompt, new_tokens in [((), 5), (PROMPT, KV_TOKENS)]:
        with pytest.raises(RequestError, match="do not fit"):
            await generate(nodes.sessions, generation_request(new_tokens, prompt))
    await assert_nothing_is_left(nodes)


async def test_generation_ends_with_a_stop_token(nodes: InProcessCluster, controller: Controller) -> None:
    every = await generate(nodes.sessions, generation_request(12))
    stop = every[5]
    tokens = [token async for token in nodes.sessions.generate(generation_request(12, stop_ids=frozenset({stop})))]
    assert [token.token_id for token in tokens] == every[: every.index(stop) + 1]
    assert [token.finish for token in tokens] == [None] * every.index(stop) + ["stop"]


async def test_no_request_is_served_before_a_placement_is_deployed(nodes: InProcessCluster) -> None:
    assert nodes.sessions.ready() == "no placement is deployed yet"
    with pytest.raises(NodeLostError, match="no placement"):
        await generate(nodes.sessions, generation_request())


async def test_demand_blends_the_declared_with_the_observed(nodes: InProcessCluster, controller: Controller) -> None:
    (declared,) = nodes.sessions.demand(10.0)
    assert (declared.name, declared.source, declared.prompt_tokens, declared.new_tokens) == (
        "chat",
        A,
        8,
        8,
    )
    for _ in range(10):
        await generate(nodes.sessions, generation_request(2, (3,) * 20))
    (seen,) = nodes.sessions.demand(10.0)
    # Ten observed requests weigh as much as the declared demand: ten seconds at one request a second.
    assert seen.prompt_tokens == pytest.approx((20 + 8) / 2)
    assert seen.new_tokens == pytest.approx((2 + 8) / 2)
    assert seen.rate_rps == pytest.approx(20 / 20)


async def test_after_a_loss_sessions_continue_on_the_next_placement_with_the_same_tokens(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    nodes.sessions.on_lost = lambda node: None  # the test plans instead of the controller
    generated = []
    async for token in nodes.sessions.generate(generation_request(30)):
        generated.append(token.token_id)
        if token.index == 10:
            await nodes.stop(C)
            replacing = asyncio.create_task(deploy(controller, [A, A, B, B, A, B, A, A]))
    await replacing
    assert generated == reference(unsplit_model, list(PROMPT), 30)
    (record,) = nodes.sessions.records(0)
    assert (record.status, record.epochs) == (200, (1, 2))


async def test_without_a_placement_requests_fail_with_the_reason_until_the_node_returns(
    nodes: InProcessCluster, controller: Controller
) -> None:
    before = await generate(nodes.sessions, generation_request())
    stream = nodes.sessions.generate(generation_request(200))
    await anext(stream)
    await nodes.stop(C)
    with pytest.raises(NodeLostError, match=f"{C} lost, and there is no problem to plan with yet"):
        await exhaust(stream)
    assert nodes.sessions.records(0)[-1].status == 503

    async def free() -> bool:
        return not any([(await nodes.state(name)).sessions for name in (A, B)])

    await until(free)
    await nodes.start(C)

    async def ready() -> bool:
        return nodes.sessions.ready() is None

    await until(ready)
    assert await generate(nodes.sessions, generation_request()) == before


async def exhaust(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def test_a_deadline_counts_while_a_request_waits_for_a_lost_node(
    nodes: InProcessCluster, controller: Controller
) -> None:
    nodes.sessions.on_lost = lambda node: None
    await nodes.stop(C)

    async def noticed() -> bool:
        return nodes.sessions.ready() is not None

    await until(noticed)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(generate(nodes.sessions, generation_request(deadline_s=0.1)), 5)
    assert nodes.sessions.records(0)[-1].status == 504


async def test_sessions_share_room_that_all_of_them_together_do_not_have(
    stored_model: StoredModel, unsplit_model: torch.nn.Module, tmp_path: Path
) -> None:
    limits = {"context_tokens": 128, "sessions": 8, "queue": 8, "deadline": "60 s", "drafts": 4}
    async with in_process(three_node_config(limits=limits, kv_tokens=128), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.membership.introduce()
        await deploy(controller, SPREAD)
        long = [asyncio.create_task(generate(nodes.sessions, generation_request(100))) for _ in range(3)]

        small = await generate(nodes.sessions, generation_request(5))
        assert not any(each.done() for each in long)
        expected = reference(unsplit_model, list(PROMPT), 100)
        assert small == expected[:5]
        assert await asyncio.gather(*long) == [expected] * 3
        assert all(record.moves == () for record in nodes.sessions.records(0))
        await controller.stop()
