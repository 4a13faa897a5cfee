"""After a loss sessions continue with the same tokens: from replicas, from caches that survived, or from the start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resplit.config import ClusterConfig
from resplit.control.controller import Controller
from resplit.model.activation import token_ids
from resplit.model.source import StoredModel, obtain
from resplit.process.cancellation import cancel_and_wait
from resplit.wire.node_pb2 import Step, Token
from resplit.wire.tensors import to_wire
from tests.support.cluster import make_model, reference
from tests.support.controllers import running_controller
from tests.support.engines import tokens_of_one_engine
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import PROMPT, A, B, C, generate, generation_request, three_node_config

D = "delta"
NODES = (A, B, C, D)
SPREAD = [A, A, B, B, C, C, B, A]
WITHOUT_C = [A, A, B, B, D, D, B, A]
LAYERS = range(1, 7)
NEW_TOKENS = 60


def config(
    copy_every: int = 4, names: tuple[str, ...] = NODES, memory: str = "8 MiB", deadline: str = "60 s"
) -> ClusterConfig:
    """Alpha and beta are trusted; delta hosts no block at first. Each token takes a pass, so that positions add up."""
    limits = {"context_tokens": 256, "sessions": 8, "queue": 4, "deadline": deadline, "copy_every": copy_every}
    return three_node_config(
        nodes=[{"name": name, "memory": memory} for name in names],
        links={"default": {"latency": "2 ms", "bandwidth": "1 Gbit/s"}},
        limits=limits | {"drafts": 0},
        kv_tokens=1024,
    )


@pytest.fixture
async def nodes(
    stored_model: StoredModel, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[InProcessCluster]:
    async with in_process(config(**getattr(request, "param", {})), stored_model, tmp_path) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcessCluster) -> AsyncIterator[Controller]:
    """A controller that does not plan: the tests deploy each placement themselves."""
    async with running_controller(nodes, SPREAD) as controller:
        nodes.sessions.on_lost = lambda node: None
        yield controller


async def in_the_middle(nodes: InProcessCluster, streams: int, act: Callable[[], Awaitable[None]]) -> list[list[int]]:
    """The tokens of `streams` streams, in the middle of which `act` is called."""
    running = [asyncio.create_task(generate(nodes.sessions, generation_request(NEW_TOKENS))) for _ in range(streams)]

    async def half_done() -> bool:
        sessions = list(nodes.sessions._live.values())
        return len(sessions) == streams and all(session.position > NEW_TOKENS // 2 for session in sessions)

    await until(half_done, 30)
    await act()
    return await asyncio.gather(*running)


def moves(nodes: InProcessCluster) -> list[dict[str, Any]]:
    return [move for record in nodes.sessions.records(0) for move in record.moves if move.replayed]


async def test_after_a_loss_only_positions_without_a_replica_are_replayed(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    async def lose() -> None:
        await nodes.stop(C)
        await deploy(controller, WITHOUT_C)

    answers = await in_the_middle(nodes, 8, lose)
    assert answers == [reference(unsplit_model, list(PROMPT), NEW_TOKENS)] * 8
    records = nodes.sessions.records(0)
    assert len(moves(nodes)) == 8
    for record in records:
        (recovery,) = [move.recovery for move in record.moves if move.replayed]
        assert recovery.replayed_positions <= 4 + 2 * record.copy_lag
        assert recovery.restored_positions > 0
        assert record.copied_bytes > 0
    seen = nodes.sessions.recoveries(2)
    assert seen is not None
    assert (seen.sessions, seen.cache_bytes) == (8, 0)  # the new host is the node that has the replicas
    await assert_nothing_left(nodes, (A, B, D))


async def test_after_a_broken_connection_no_pass_is_replayed(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    async def break_connections() -> None:
        nodes.break_connections(C)

    answers = await in_the_middle(nodes, 3, break_connections)
    assert answers == [reference(unsplit_model, list(PROMPT), NEW_TOKENS)] * 3
    assert moves(nodes)
    assert all(move.recovery.replayed_positions == 0 for move in moves(nodes))
    assert {epoch for record in nodes.sessions.records(0) for epoch in record.epochs} == {1}
    await assert_nothing_left(nodes, NODES)


async def test_after_the_loss_of_host_and_stand_by_node_every_pass_is_replayed(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    async def lose() -> None:
        copies = {name: (await nodes.state(name)).copies for name in (A, B, D)}
        (stand_by,) = [name for name, blocks in copies.items() if {4, 5} & set(blocks)]
        assert stand_by == D  # it has most room
        await asyncio.gather(nodes.stop(C), nodes.stop(D))
        await deploy(controller, [A, A, B, B, A, B, B, A])

    answers = await in_the_middle(nodes, 3, lose)
    assert answers == [reference(unsplit_model, list(PROMPT), NEW_TOKENS)] * 3
    assert {move.recovery.restored_positions for move in moves(nodes)} == {0}
    await assert_nothing_left(nodes, (A, B))


async def test_surviving_nodes_transfer_the_caches_of_blocks_that_move(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    async def lose() -> None:
        await nodes.stop(C)
        await deploy(controller, [B, B, A, A, D, A, A, B])

    answers = await in_the_middle(nodes, 3, lose)
    assert answers == [reference(unsplit_model, list(PROMPT), NEW_TOKENS)] * 3
    assert all(move.recovery.restored_positions > NEW_TOKENS // 4 for move in moves(nodes))
    assert all(move.cache_bytes > 0 for move in moves(nodes))


@pytest.mark.parametrize("nodes", [{"deadline": "10 min"}], indirect=True)
async def test_a_stand_by_node_that_returns_keeps_replicas_again(
    nodes: InProcessCluster, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcome, welcomed = nodes.sessions.welcome, asyncio.Event()
    monkeypatch.setattr(nodes.sessions, "welcome", lambda node: (welcome(node), welcomed.set()))

    async def copies() -> bool:
        return {4, 5} <= set((await nodes.state(D)).copies)

    stream = asyncio.create_task(generate(nodes.sessions, generation_request(240)))
    await until(copies, 60)
    async with nodes.sessions.paused():  # it does not end meanwhile
        await nodes.stop(D)
        await nodes.start(D)
        await welcomed.wait()
        assert not await copies()
    await until(copies, 60)
    await cancel_and_wait([stream])


@pytest.mark.parametrize("nodes", [{"deadline": "10 min"}], indirect=True)
async def test_after_a_stand_by_node_has_returned_the_loss_of_the_host_replays_no_whole_context(
    nodes: InProcessCluster,
    controller: Controller,
    unsplit_model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    welcome, welcomed = nodes.sessions.welcome, asyncio.Event()
    monkeypatch.setattr(nodes.sessions, "welcome", lambda node: (welcome(node), welcomed.set()))

    async def at(position: int) -> None:
        async def is_there() -> bool:
            return next(iter(nodes.sessions._live.values())).position >= position

        await until(is_there, 60)

    async def copies() -> bool:
        return {4, 5} <= set((await nodes.state(D)).copies)

    stream = asyncio.create_task(generate(nodes.sessions, generation_request(200)))
    await until(copies, 60)
    async with nodes.sessions.paused():  # it does not end meanwhile
        await nodes.stop(D)
        await nodes.start(D)
        await welcomed.wait()
    await until(copies, 60)
    await at(120)
    async with nodes.sessions.paused():
        await nodes.stop(C)
    await deploy(controller, WITHOUT_C)
    assert await stream == reference(unsplit_model, list(PROMPT), 200)
    (move,) = moves(nodes)
    assert move.recovery.restored_positions > 100
    assert move.recovery.replayed_positions < 20


@pytest.mark.parametrize("nodes", [{"copy_every": 0}], indirect=True)
async def test_without_replication_every_pass_is_replayed_and_no_node_has_a_replica(
    nodes: InProcessCluster, controller: Controller, unsplit_model: torch.nn.Module
) -> None:
    async def lose() -> None:
        assert not any([(await nodes.state(name)).copies for name in NODES])
        await nodes.stop(C)
        await deploy(controller, WITHOUT_C)

    answers = await in_the_middle(nodes, 2, lose)
    assert answers == [reference(unsplit_model, list(PROMPT), NEW_TOKENS)] * 2
    assert {move.recovery.restored_positions for move in moves(nodes)} == {0}
    assert {record.copied_bytes for record in nodes.sessions.records(0)} == {0}


@pytest.mark.parametrize(("engine", "weights"), [("onnx", "int4"), ("onnx", "int8"), ("torch", "float32")])
async def test_a_replay_in_one_pass_changes_no_token_of_any_engine(engine: Any, weights: Any, tmp_path: Path) -> None:
    """The weights are large: a change of the last bits soon becomes another token, as one prefill for all shows."""
    model = obtain(str(make_model(tmp_path, initializer_range=0.5)), tmp_path / "models", weights, engine=engine)
    async with in_process(config(copy_every=0), model, tmp_path) as nodes:
        controller = nodes.controller()
        await controller.membership.introduce()
        await deploy(controller, SPREAD)
        nodes.sessions.on_lost = lambda node: None

        async def lose() -> None:
            await nodes.stop(C)
            await deploy(controller, WITHOUT_C)

        answers = await in_the_middle(nodes, 2, lose)
        assert answers == [tokens_of_one_engine(model, PROMPT, NEW_TOKENS)] * 2
        assert all(move.recovery.replayed_positions > NEW_TOKENS // 2 for move in moves(nodes))
        await controller.stop()


async def test_every_layer_has_a_replica_and_private_ones_are_on_trusted_nodes_only(
    nodes: InProcessCluster, controller: Controller
) -> None:
    replicas: dict[str, set[int]] = {name: set() for name in NODES}

    async def check() -> None:
        for name in NODES:
            state = await nodes.state(name)
            replicas[name] |= set(state.copies)
            assert state.held_bytes <= state.memory_bytes

    await in_the_middle(nodes, 2, check)
    assert set().union(*replicas.values()) == set(LAYERS)
    private = set(nodes.private) & set(LAYERS)
    assert private
    assert not private & (replicas[C] | replicas[D])
    assert private <= replicas[A] | replicas[B]


async def test_a_drained_node_gets_no_replicas(nodes: InProcessCluster, controller: Controller) -> None:
    nodes.sessions.reconfigure(nodes.config, nodes.features, frozenset({D}))

    async def check() -> None:
        assert (await nodes.state(D)).copies == ()
        assert (await nodes.state(B)).copies

    await in_the_middle(nodes, 1, check)


async def test_a_lost_stand_by_node_is_replaced(nodes: InProcessCluster, controller: Controller) -> None:
    async def lose() -> None:
        await nodes.stop(D)

        async def replaced() -> bool:
            replicas = [set((await nodes.state(name)).copies) for name in (A, B, C)]
            return set().union(*replicas) == set(LAYERS)

        await until(replaced)

    await in_the_middle(nodes, 2, lose)
    assert moves(nodes) == []


@pytest.mark.parametrize("nodes", [{"names": (A, B, C), "memory": "1000 KiB"}], indirect=True)
async def test_without_room_there_are_no_replicas_and_no_request_is_refused(
    nodes: InProcessCluster, unsplit_model: torch.nn.Module
) -> None:
    controller = nodes.controller()
    await controller.membership.introduce()
    await deploy(controller, [A, A, B, B, C, C, A, A])  # two layers each with their reserved caches: no replica fits

    async def check() -> None:
        states = [await nodes.state(name) for name in (A, B, C)]
        assert [state.copies for state in states] == [(), (), ()]

    answers = await in_the_middle(nodes, 8, check)
    assert answers == [reference(unsplit_model, list(PROMPT), NEW_TOKENS)] * 8
    assert {record.copied_bytes for record in nodes.sessions.records(0)} == {0}
    await controller.stop()


async def test_a_step_of_another_attempt_is_refused(nodes: InProcessCluster, controller: Controller) -> None:
    answers: list[Token] = []
    nodes.router.on_token = lambda node, token: answers.append(token)

    def step(attempt: int) -> Step:
        values = to_wire(token_ids(PROMPT))
        return Step(session="s", epoch=1, attempt=attempt, values=values, gateway="controller")

    async def answered() -> bool:
        return bool(answers)

    for name in NODES:
        assert await nodes.permit(name, "s", attempt=2) == {}
    for attempt in (1, 3):
        nodes.peer(A).send(step(attempt))
        await until(answered)
        assert (answers[0].error_kind, answers[0].attempt) == ("stale", attempt)
        assert f"is in attempt 2, not {attempt}" in answers.pop().error
    nodes.peer(A).send(step(2))
    await until(answered)
    assert (answers[0].error, answers[0].attempt) == ("", 2)
    assert await nodes.permit(A, "s", attempt=3) == {1: len(PROMPT)}
    await asyncio.gather(*(nodes.peer(name).close_sessions(["s"]) for name in NODES))


async def assert_nothing_left(nodes: InProcessCluster, names: tuple[str, ...]) -> None:
    assert nodes.sessions.status().sessions == 0

    async def free() -> bool:
        states = [await nodes.state(name) for name in names]
        return not any(state.sessions or state.copies for state in states)

    await until(free)
