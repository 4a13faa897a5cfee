"""A node takes steps and caches only from the member that the session's route and permits name, by its certificate.

Gamma is a member with valid credentials. It tries to write to sessions that do not run through it.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from structlog.testing import capture_logs

from resplit.control.controller import Controller
from resplit.model.activation import Activation, token_ids
from resplit.model.source import StoredModel
from resplit.node import server
from resplit.process.cancellation import cancel_and_wait
from resplit.security.identity import CONTROLLER, STEPS, TOKENS
from resplit.wire.node_pb2 import (
    CloseRequest,
    CommandRequest,
    EchoRequest,
    MeasureRequest,
    PermitRequest,
    ReportRequest,
    Step,
    Token,
    TokensRequest,
    TransferRequest,
    Version,
)
from resplit.wire.patience import Patience
from resplit.wire.permits import Permit
from resplit.wire.tensors import to_wire
from resplit.wire.version import own_version
from tests.support.cluster import reference
from tests.support.controllers import running_controller
from tests.support.forgeries import forged_parts, forged_steps, forged_tokens
from tests.support.hostile import HostileClient, HostileNode, framed
from tests.support.in_process import InProcessCluster, deploy, in_process, until
from tests.support.three_nodes import PROMPT, A, B, C, generate, generation_request, three_node_config

WITHOUT_C = [A, A, B, B, B, B, A, A]
WITH_C = [A, A, B, B, C, C, A, A]
NEW_TOKENS = 30
LONG = 400  # still generates when a new epoch has gone live, on the fastest machine
POSITIONS = len(PROMPT) + NEW_TOKENS
HIDDEN = Activation("float32", (1, 4, 64), struct.pack("<f", 0.5) * 256)


@pytest.fixture
async def gamma() -> HostileNode:
    return HostileNode()


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path, gamma: HostileNode) -> AsyncIterator[InProcessCluster]:
    config = three_node_config(
        kv_tokens=512,
        limits={"context_tokens": 512, "sessions": 8, "queue": 4, "deadline": "20 s", "copy_every": 4},
    )
    async with in_process(config, stored_model, tmp_path, {C: gamma.service}) as running:
        yield running


@pytest.fixture
async def controller(nodes: InProcessCluster) -> AsyncIterator[Controller]:
    async with running_controller(nodes) as controller:
        yield controller


@pytest.fixture
async def liar(nodes: InProcessCluster) -> AsyncIterator[HostileClient]:
    """A client with gamma's credentials."""
    client = HostileClient(nodes.addresses, nodes.folder / "keys" / C)
    yield client
    await client.disconnect()


async def attacked(nodes: InProcessCluster, gamma: HostileNode, liar: HostileClient, epoch: int) -> list[int]:
    """The tokens of one request, while gamma sends all it can for its session."""
    request = asyncio.create_task(generate(nodes.sessions, generation_request(NEW_TOKENS)))

    async def begun() -> bool:
        return any(session.position for session in nodes.sessions._live.values())

    await until(begun)
    (session,) = nodes.sessions.session_names()
    while not request.done():
        await gamma.say(*forged_tokens(session, epoch, POSITIONS))
        for node in (A, B):
            await liar.steps(node, forged_steps(session, epoch, C))
            reply = await liar.cache(node, forged_parts(session, POSITIONS))
            assert "may not send the cache" in reply.error or "has ended" in reply.error
    return await request


async def test_a_member_outside_the_route_changes_nobodys_answer(
    nodes: InProcessCluster,
    controller: Controller,
    gamma: HostileNode,
    liar: HostileClient,
    unsplit_model: torch.nn.Module,
) -> None:
    await deploy(controller, WITHOUT_C)
    expected = reference(unsplit_model, list(PROMPT), NEW_TOKENS)
    for _ in range(3):
        assert await attacked(nodes, gamma, liar, 1) == expected
    assert {move.replayed for record in nodes.sessions.records(0) for move in record.moves} == set()
    for node in (A, B):
        assert (await nodes.state(node)).refusals["unexpected"] > 0


async def test_a_member_that_left_the_route_writes_to_no_session_that_moved_away_from_it(
    nodes: InProcessCluster,
    controller: Controller,
    gamma: HostileNode,
    liar: HostileClient,
    unsplit_model: torch.nn.Module,
) -> None:
    await deploy(controller, WITH_C)
    request = asyncio.create_task(generate(nodes.sessions, generation_request(LONG)))

    async def half_done() -> bool:
        return any(session.position > 20 for session in nodes.sessions._live.values())

    await until(half_done)
    await deploy(controller, WITHOUT_C)

    async def moved() -> bool:
        permits = [session.permits for session in nodes.sessions._live.values() if session.route.epoch == 2]
        return bool(permits) and permits[0]._told.keys() >= {A, B} and permits[0]._told[A].epochs == {2}

    await until(moved)
    (session,) = nodes.sessions.session_names()
    old_step = Step(session=session, epoch=1, segment=2, values=to_wire(HIDDEN), gateway=CONTROLLER)
    nodes.router.on_token(C, Token(session=session, epoch=2, position=10**6, error="no", error_kind="data"))
    await liar.steps(A, [old_step])
    for node in (A, B):
        assert (await liar.cache(node, forged_parts(session, POSITIONS))).error
    assert await request == reference(unsplit_model, list(PROMPT), LONG)
    (record,) = nodes.sessions.records(0)
    assert record.epochs == (1, 2)
    assert [move.replayed for move in record.moves] == [False]


async def test_guesses_sent_as_steps_teach_nothing_about_the_private_blocks(
    nodes: InProcessCluster, controller: Controller, gamma: HostileNode, liar: HostileClient
) -> None:
    await deploy(controller, WITH_C)
    before = [await nodes.state(node) for node in (A, B, C)]
    gamma.heard.clear()
    guesses = [
        Step(session=f"guess-{number}", epoch=1, values=to_wire(token_ids([number])), gateway=CONTROLLER)
        for number in range(20)
    ]
    await liar.steps(A, guesses)
    after = [await nodes.state(node) for node in (A, B, C)]
    assert after[0].refusals == {"unexpected": len(guesses)}
    assert [state.held_bytes for state in after] == [state.held_bytes for state in before]
    assert gamma.steps() == []


async def test_a_member_on_the_route_cannot_fill_memory_with_sessions_that_do_not_exist(
    nodes: InProcessCluster, controller: Controller, liar: HostileClient, unsplit_model: torch.nn.Module
) -> None:
    await deploy(controller, WITH_C)
    before = await nodes.state(A)
    made_up = [
        Step(session=f"made-up-{number}", epoch=1, segment=3, values=to_wire(HIDDEN), gateway=CONTROLLER)
        for number in range(200)
    ]
    await liar.steps(A, made_up)  # gamma runs segment 2
    after = await nodes.state(A)
    assert (after.sessions, after.held_bytes) == (before.sessions, before.held_bytes)
    expected = reference(unsplit_model, list(PROMPT), NEW_TOKENS)
    assert await generate(nodes.sessions, generation_request(NEW_TOKENS)) == expected


async def test_a_permit_in_a_step_counts_only_from_the_gateway(
    nodes: InProcessCluster, controller: Controller, liar: HostileClient
) -> None:
    await deploy(controller, WITH_C)
    permit = Permit(0, 2**31, frozenset({1}), {1: C}).to_wire("made-up", keep=False)
    await liar.steps(A, [Step(session="made-up", epoch=1, segment=3, permit=permit, gateway=CONTROLLER)])
    reply = await liar.cache(A, forged_parts("made-up", 4)[:1])
    assert "session made-up has not begun here" in reply.error
    assert (await nodes.state(A)).refusals == {"unexpected": 1, "stale": 1}


async def test_a_session_that_a_node_has_closed_gets_an_error_and_not_silence(
    nodes: InProcessCluster, controller: Controller
) -> None:
    await deploy(controller, WITH_C)
    answers: list[tuple[str, Token]] = []
    nodes.router.on_token = lambda *answer: answers.append(answer)
    await nodes.peer(B).close_sessions(["closed"])
    permit = Permit(0, 64, frozenset({1})).to_wire("closed", keep=False)
    nodes.peer(B).send(Step(session="closed", epoch=1, permit=permit, gateway=CONTROLLER))

    async def answered() -> bool:
        return bool(answers)

    await until(answered)
    node, answer = answers[0]
    assert (node, answer.session, answer.error_kind) == (B, "closed", "stale")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("Permit", PermitRequest(session="s", attempt=2**32 - 1, capacity=2**32 - 1, epochs=[1], senders={2: C})),
        ("TransferCache", TransferRequest(session="s", target=[C] * 8, last=4)),
        ("Report", ReportRequest()),
        ("Measure", MeasureRequest(nodes=[C])),
    ],
)
async def test_only_the_controller_gives_permits_and_asks_for_caches_reports_and_measurements(
    nodes: InProcessCluster, liar: HostileClient, call: str, message: object
) -> None:
    with pytest.raises(GRPCError) as refusal:
        await liar.call(A, call, message)  # type: ignore[arg-type]
    assert refusal.value.status is Status.PERMISSION_DENIED


async def test_only_the_controller_gets_tokens(nodes: InProcessCluster, liar: HostileClient) -> None:
    asked = framed(TokensRequest(version=own_version().message()))
    assert await liar.raw(A, asked, waits_s=10, protocol=TOKENS) == b""  # the node ends the stream
    assert (await nodes.state(A)).refusals == {"unexpected": 1}


async def test_a_controller_of_another_version_is_named_in_the_log_and_one_without_a_version_is_refused(
    nodes: InProcessCluster, tmp_path: Path
) -> None:
    controller = HostileClient(nodes.addresses, tmp_path / "keys" / CONTROLLER)
    with capture_logs() as logs:
        newer = framed(TokensRequest(version=Version(wire=10**6, release="9.1")))
        assert own_version().release.encode() in await controller.raw(A, newer, waits_s=1, protocol=TOKENS)
        assert await controller.raw(A, framed(TokensRequest()), waits_s=10, protocol=TOKENS) == b""
    told = [line["version"] for line in logs if line["event"] == "the controller has another version"]
    assert [each.split(":")[-1] for each in told] == [
        f" upgrade resplit on {A}",
        f" upgrade resplit on {CONTROLLER}",
    ]
    assert (await nodes.state(A)).refusals == {"unexpected": 1}
    await controller.disconnect()


def bear_only(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on each node accepts so many refused messages of a member, and none for an hour after that."""
    noted, note = Counter[int](), Patience.note

    def note_some(self: Patience, now_s: float, weight: float = 1.0) -> float:
        if self.most != server._REFUSED_AT_ONCE:  # it is about something else
            return note(self, now_s, weight)
        noted[id(self)] += 1
        return 3600.0 if noted[id(self)] > most else 0.0

    monkeypatch.setattr(Patience, "note", note_some)


@pytest.mark.parametrize("epoch", [1, 99], ids=["live", "unknown"])
async def test_a_flood_of_refused_steps_is_read_slowly_and_brings_the_gateway_few_answers(
    nodes: InProcessCluster,
    controller: Controller,
    liar: HostileClient,
    monkeypatch: pytest.MonkeyPatch,
    unsplit_model: torch.nn.Module,
    epoch: int,
) -> None:
    await deploy(controller, WITHOUT_C)
    bear_only(5, monkeypatch)
    answers, on_token = list[str](), nodes.router.on_token

    def record(node: str, token: Token) -> bool:
        answers.append(token.session)
        return on_token(node, token)

    nodes.router.on_token = record
    flood = framed(Step(session="flood", epoch=epoch, gateway=CONTROLLER, acknowledge=True)) * 500
    streams = [asyncio.create_task(liar.raw(A, flood, waits_s=60.0, protocol=STEPS)) for _ in range(2)]

    async def are_read() -> bool:
        return sum((await nodes.state(A)).refusals.values()) >= 7

    await until(are_read)
    expected = reference(unsplit_model, list(PROMPT), NEW_TOKENS)
    assert await generate(nodes.sessions, generation_request(NEW_TOKENS)) == expected
    refused = (await nodes.state(A)).refusals
    assert sum(refused.values()) == 7, "five at once, then one more on each stream"
    assert answers.count("flood") == (7 if epoch == 99 else 0)
    await cancel_and_wait(streams)


async def test_refused_calls_of_one_member_wait_once_they_are_many_and_others_do_not(
    nodes: InProcessCluster, controller: Controller, liar: HostileClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deploy(controller, WITHOUT_C)
    bear_only(30, monkeypatch)  # its probe makes some calls too
    for call, message in (("Command", CommandRequest()), ("Echo", EchoRequest()), ("Echo", EchoRequest())):
        await liar.call(A, call, message)
    for call, message in (("Permit", PermitRequest()), ("Report", ReportRequest()), ("Close", CloseRequest())):
        with pytest.raises(GRPCError):
            await liar.call(A, call, message)
    flood = asyncio.gather(*(liar.call(A, "Command", CommandRequest()) for _ in range(40)))
    for calls in (flood, liar.call(A, "Close", CloseRequest()), liar.call(A, "Echo", EchoRequest())):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(calls, 0.5)
    assert len(await generate(nodes.sessions, generation_request(NEW_TOKENS))) == NEW_TOKENS
