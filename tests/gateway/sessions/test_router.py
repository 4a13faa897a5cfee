"""Requests wait while lost nodes are replaced, and fail at once if none can be. Faulty nodes count as lost."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from resplit.errors import NodeLostError
from resplit.gateway.sessions import router as router_module
from resplit.gateway.sessions.manager import Sessions
from resplit.model.source import StoredModel
from resplit.process.cancellation import until_stopped
from resplit.wire.node_pb2 import Hello, Token, Version
from resplit.wire.peers import Peer
from resplit.wire.version import own_version
from tests.support.hostile import HostileNode, answers
from tests.support.in_process import deploy, in_process, until
from tests.support.three_nodes import SPREAD, A, B, C, generate, generation_request, three_node_config


async def first_token(sessions: Sessions) -> int:
    tokens = sessions.generate(generation_request())
    async for token in tokens:
        return token.token_id
    raise AssertionError("no token")


async def test_a_waiting_request_fails_at_once_when_no_placement_is_possible(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await deploy(controller, SPREAD)
        nodes.sessions.on_lost = lambda node: None  # no new plan is made, so the request waits
        await nodes.stop(C)

        async def noticed() -> bool:
            return C not in nodes.router.listening

        await until(noticed)
        waiting = asyncio.create_task(first_token(nodes.sessions))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        begun_s = time.monotonic()
        nodes.sessions.set_unavailable("no placement is left")
        with pytest.raises(NodeLostError, match="no placement is left"):
            await waiting
        assert time.monotonic() - begun_s < 5
        await controller.stop()


async def test_a_connection_that_breaks_for_a_moment_does_not_fail_a_request(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await deploy(controller, SPREAD)
        tokens = []
        async for token in nodes.sessions.generate(generation_request()):
            tokens.append(token.token_id)
            if len(tokens) == 2:
                nodes.break_connections(C)  # the controller has no problem yet, so it cannot plan
        assert len(tokens) == generation_request().max_new_tokens
        await controller.stop()


async def test_a_defect_while_tokens_are_received_is_a_failure_of_the_process(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        controller = nodes.controller()
        await deploy(controller, SPREAD)

        def defect(node: str, token: Token) -> None:
            raise KeyError(token.session)

        nodes.router.on_token = defect
        request = asyncio.create_task(first_token(nodes.sessions))

        with pytest.raises(KeyError):
            await asyncio.wait_for(until_stopped(asyncio.Event(), nodes.router.tasks), 30)
        request.cancel()
        await controller.stop()


async def test_a_faulty_node_is_lost_with_the_reason_and_tried_again_after_a_wait_that_doubles(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "_FIRST_WAIT_S", 0.2)
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        router, lost = nodes.router, list[str]()
        nodes.sessions.on_lost = lost.append
        for wait_s in (0.2, 0.4):
            begun_s = time.monotonic()
            nodes.peer(C).fault("it talks nonsense")
            nodes.peer(C).fault("again, while it counts as lost")
            assert router.listening == {A, B}
            assert nodes.sessions.faults() == {C: "it talks nonsense"}
            await router.wait_for({A, B, C}, 5)
            assert wait_s <= time.monotonic() - begun_s
            assert nodes.sessions.faults() == {}
        assert lost == [C, C]
        assert router.faults[C].wait_s == 0.4


@pytest.mark.parametrize(("quiet_s", "suspect", "next_wait_s"), [(0, True, 8.0), (1200, True, 2.0), (1800, False, 1.0)])
async def test_faults_are_forgiven_one_by_one(
    stored_model: StoredModel, tmp_path: Path, quiet_s: float, suspect: bool, next_wait_s: float
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:
        router = nodes.router
        router.faults[C] = router_module.Fault("it was slow", 4.0, time.monotonic() - quiet_s)
        assert (C in nodes.sessions.suspects()) == suspect
        nodes.peer(C).fault("it is slow again")
        assert router.faults[C].wait_s == next_wait_s
        assert nodes.sessions.suspects() == {C}


@pytest.mark.parametrize("stray", [Token(session="s", epoch=1, token_ids=[3]), Token(news=True)], ids=["token", "news"])
async def test_a_node_that_sends_many_tokens_of_no_pass_is_faulty_and_one_that_sends_few_is_not(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stray: Token
) -> None:
    monkeypatch.setattr(router_module, "_STRAYS_AT_ONCE", 40)
    monkeypatch.setattr(router_module, "_STRAYS_PER_S", 1e-9)
    gamma, strays = HostileNode(), [stray] * 20
    async with in_process(three_node_config(), stored_model, tmp_path, {C: gamma.service}) as nodes:
        controller = nodes.controller()
        await deploy(controller, [A, A, B, B, B, B, B, A])
        await gamma.say(*strays)
        assert len(await generate(nodes.sessions, generation_request())) == generation_request().max_new_tokens
        assert nodes.router.faults == {}
        await gamma.say(*strays, *strays)

        async def faulty() -> bool:
            return C in nodes.router.faults

        await until(faulty, 30.0)
        assert nodes.router.faults[C].reason == "it sends many tokens that belong to no pass"
        assert len(await generate(nodes.sessions, generation_request())) == generation_request().max_new_tokens
        await controller.stop()


async def test_a_large_token_of_no_pass_counts_as_many(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gamma = HostileNode()
    async with in_process(three_node_config(), stored_model, tmp_path, {C: gamma.service}) as nodes:
        await gamma.say(Token(session="s", epoch=1, token_ids=[3] * 2_000_000))

        async def faulty() -> bool:
            return C in nodes.router.faults

        await until(faulty, 30.0)


@pytest.mark.parametrize(
    "hello",
    [
        Hello(),
        Hello(nonce="x", clock_s=9),
        Hello(nonce="5" * 32, epoch=2**64 - 1, clock_s=9),
        Hello(nonce="5" * 32, clock_s=math.nan),
        Hello(nonce="5" * 32, clock_s=-9),
    ],
    ids=["nothing", "nonce", "epoch", "no clock", "clock"],
)
async def test_a_node_without_a_hello_is_not_connected(stored_model: StoredModel, tmp_path: Path, hello: Hello) -> None:
    hello.version.CopyFrom(own_version().message())
    gamma = HostileNode()
    async with in_process(three_node_config(), stored_model, tmp_path, {C: gamma.service}) as nodes:
        gamma.lies["Tokens"] = answers(Token(hello=hello))
        nodes.break_connections(C)

        async def faulty() -> bool:
            return C in nodes.router.faults

        await until(faulty)
        assert nodes.sessions.faults()[C].startswith("its first words cannot be read")
        assert C not in nodes.router.listening


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (Token(), f"{C} runs a resplit that says no version, and controller runs"),
        (Token(session="s", epoch=1, token_ids=[3]), "says no version"),
        (Token(hello=Hello(nonce="5" * 32, clock_s=9)), f"upgrade resplit on {C}"),
        (Token(hello=Hello(version=Version(wire=10**6, release="9.1"))), "upgrade resplit on controller"),
    ],
    ids=["nothing", "a token", "an older one", "a newer one"],
)
async def test_a_node_of_another_version_is_named_and_connected_once_it_has_the_same(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Token, says: str
) -> None:
    monkeypatch.setattr(router_module, "_FIRST_WAIT_S", 0.2)
    gamma = HostileNode()
    async with in_process(three_node_config(), stored_model, tmp_path, {C: gamma.service}) as nodes:
        gamma.lies["Tokens"] = answers(first)
        nodes.break_connections(C)

        async def named() -> bool:
            return says in nodes.sessions.faults().get(C, "")

        await until(named)
        assert C not in nodes.router.listening
        gamma.lies.clear()  # as the upgraded process
        nodes.break_connections(C)
        await nodes.router.wait_for({C}, 30.0)


@pytest.mark.parametrize(
    ("ahead_s", "says"), [(60.0, "its clock is 60.0 s ahead of the controller's"), (-6.0, "6.0 s behind")]
)
async def test_a_wrong_clock_is_named_with_seconds_and_direction_when_a_node_connects(
    stored_model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float, says: str
) -> None:
    async with in_process(three_node_config(), stored_model, tmp_path) as nodes:

        def greet(self: Peer, words: Hello, asked_s: float, greet: Callable[..., None] = Peer._greet) -> None:
            words.clock_s = time.time() + (ahead_s if self.name == C else 0)
            greet(self, words, asked_s)

        with capture_logs() as logs:
            monkeypatch.setattr(Peer, "_greet", greet)
            nodes.break_connections(C)

            async def connected() -> bool:
                return C in nodes.router.listening and abs(nodes.peer(C).clock_ahead_s) > 1

            await until(connected)
        assert any(says in line.get("clock", "") for line in logs)
        assert nodes.sessions.clocks_ahead_s()[C] == pytest.approx(ahead_s, abs=0.5)
        assert nodes.sessions.clocks_ahead_s()[A] == pytest.approx(0, abs=0.5)
