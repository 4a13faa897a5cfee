"""A node begins follow-ups while the session may run them here, and no more once anything has changed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from resplit.errors import CommandRefusedError
from resplit.model.activation import token_ids
from resplit.model.engines.base import SessionRows
from resplit.model.source import StoredModel
from resplit.node.agent import Agent
from resplit.node.server import NodeService
from resplit.security.identity import CONTROLLER
from resplit.wire.node_pb2 import Sampling, Step, Token
from resplit.wire.tensors import to_wire
from tests.support.in_process import InProcessCluster, in_process, until
from tests.support.three_nodes import A, B, three_node_config

HERE = [A] * 8


class Gated:
    """Node alpha, whose batches begin one by one, when they may; `begun` has the starts of passes by session."""

    def __init__(self) -> None:
        self.begun: dict[str, list[int]] = {}
        self.agent: Agent
        self._may_begin = threading.Semaphore(0)

    def service(self, agent: Agent, verifier: Any) -> NodeService:
        self.agent = agent
        return NodeService(agent, verifier)

    def install(self) -> None:
        engine = self.agent.hosting.running().engine
        compute = engine.run

        def run(first: int, last: int, batch: Sequence[SessionRows], after: Callable[[int], None]) -> list[Any]:
            for rows in batch:
                self.begun.setdefault(rows.session, []).append(rows.start)
            self._may_begin.acquire()
            return compute(first, last, batch, after)

        engine.run = run  # type: ignore[method-assign]

    def let_begin(self, batches: int) -> None:
        self._may_begin.release(batches)


@pytest.fixture
async def gated() -> AsyncIterator[Gated]:
    gated = Gated()
    yield gated
    gated.let_begin(1000)


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path, gated: Gated) -> AsyncIterator[InProcessCluster]:
    async with in_process(three_node_config(), stored_model, tmp_path, {A: gated.service}) as running:
        for epoch in (1, 2):
            await running.command(A, "prepare", running.prepare_body(A, HERE, epoch), epoch)
        await running.command(A, "commit", {"epoch": 1}, 1)
        gated.install()
        yield running
        gated.let_begin(1000)


def decode_step(session: str, follow_until: int, start: int = 0, **more: Any) -> Step:
    values = to_wire(token_ids([5] * (3 if start == 0 else 1)))
    fields: dict[str, Any] = {"epoch": 1, "gateway": CONTROLLER, "sampling": Sampling()} | more
    return Step(session=session, start=start, values=values, follow_until=follow_until, **fields)


class Answers:
    """The tokens of each session, as they come to the gateway."""

    def __init__(self, nodes: InProcessCluster) -> None:
        self.of: dict[str, list[Token]] = {}
        nodes.router.on_token = self._take

    def _take(self, node: str, token: Token) -> bool:
        self.of.setdefault(token.session, []).append(token)
        return True

    async def count(self, session: str, number: int) -> list[Token]:
        async def came() -> bool:
            return len(self.of.get(session, [])) >= number

        await until(came, 20)
        return self.of[session]


async def followed(nodes: InProcessCluster, gated: Gated, answers: Answers, **permit: Any) -> None:
    """Session s: three passes are done, which followed one another, and a fourth one is under way."""
    await nodes.permit(A, "s", **permit)
    nodes.peer(A).send(decode_step("s", follow_until=60))
    gated.let_begin(3)
    await answers.count("s", 3)

    async def fourth() -> bool:
        return len(gated.begun["s"]) == 4

    await until(fourth, 20)
    assert [(token.position, token.followed) for token in answers.of["s"]] == [(3, True), (4, True), (5, True)]


async def ended(nodes: InProcessCluster) -> None:
    await nodes.peer(A).close_sessions(["s"])


async def moved(nodes: InProcessCluster) -> None:
    await nodes.permit(A, "s", epochs=frozenset({2}))


async def newer_epoch(nodes: InProcessCluster) -> None:
    await nodes.command(A, "commit", {"epoch": 2}, 2)


async def told(nodes: InProcessCluster) -> None:
    nodes.peer(A).send(Step(session="s", epoch=1, follow_until=0))
    # After this step, which is refused, the message before it has arrived.
    refused = len((await nodes.state(A)).refusals)
    nodes.peer(A).send(decode_step("t", 0, segment=1))

    async def arrived() -> bool:
        return len((await nodes.state(A)).refusals) > refused

    await until(arrived, 20)


@pytest.mark.parametrize("change", [ended, moved, newer_epoch, told])
async def test_nothing_follows_the_pass_under_way_once_it_may_not(
    nodes: InProcessCluster, gated: Gated, change: Callable[[InProcessCluster], Awaitable[None]]
) -> None:
    answers = Answers(nodes)
    await followed(nodes, gated, answers)
    await change(nodes)
    gated.let_begin(1)
    last = (await answers.count("s", 4))[3]
    assert not last.followed
    await nodes.permit(A, "other", epochs=frozenset({1, 2}))
    nodes.peer(A).send(decode_step("other", 0))
    gated.let_begin(10)
    await answers.count("other", 1)
    assert gated.begun["s"] == [0, 3, 4, 5]


async def test_nothing_follows_the_pass_of_an_attempt_that_was_given_up(nodes: InProcessCluster, gated: Gated) -> None:
    answers = Answers(nodes)
    await followed(nodes, gated, answers)
    beginning = asyncio.create_task(nodes.permit(A, "s", attempt=1))  # answered once the pass under way has ended

    while not gated.agent.hosting.permits.covering("s", 1, 1, 1):  # noqa: ASYNC110 - it comes over a connection
        await asyncio.sleep(0.001)
    gated.let_begin(1)
    assert not (await answers.count("s", 4))[3].followed
    assert await beginning
    nodes.peer(A).send(decode_step("s", 0, start=6, attempt=1))
    gated.let_begin(10)
    assert (await answers.count("s", 5))[4].attempt == 1
    assert gated.begun["s"] == [0, 3, 4, 5, 6]


async def test_follow_ups_end_where_the_session_may_cache_no_more(nodes: InProcessCluster, gated: Gated) -> None:
    answers = Answers(nodes)
    await followed(nodes, gated, answers, capacity=8)
    gated.let_begin(100)
    tokens = await answers.count("s", 6)
    assert [(token.position, token.followed) for token in tokens[3:]] == [(6, True), (7, True), (8, False)]
    assert not any(token.error for token in tokens)


async def test_a_member_that_is_not_the_gateway_cannot_ask_for_them(nodes: InProcessCluster, gated: Gated) -> None:
    answers = Answers(nodes)
    await nodes.permit(A, "s")
    nodes.peer(A).send(decode_step("s", follow_until=0))
    step = Step(session="s", epoch=1, follow_until=60)
    with pytest.raises(CommandRefusedError, match=f"{B} may not send steps of segment 0"):
        gated.agent.passes.accept(B, step)
    gated.let_begin(100)
    assert not (await answers.count("s", 1))[0].followed
